"""Model card, as Markdown: the model, its training and its scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from raygkd.config import recorded_settings
from raygkd.deploy.facts import Facts
from raygkd.models import LoadedWeights, ModelFile
from raygkd.version import __version__

_USE = """```python
from safetensors.torch import load_file
from raygkd.models import build_model

model = build_model({name!r}, {classes}, {size})
model.load_state_dict(load_file({file!r}))
model.eval()
```"""
# settings that may be paths of this machine
_PATHS = (
    *("data_dir", "unlabelled", "teacher", "teacher_weights", "student_weights", "space"),
    "warm_start",
)
_UNNAMED = ("val_score", "val_loss")
_RESIZE = {
    "stretch": "stretched to a square",
    "centre-crop": "cropped to the centre square, 7/8 of the shorter side",
    "canvas": "fitted into a square and padded with grey (114)",
}


def model_card(
    model_file: ModelFile,
    facts: Facts,
    *,
    parameters: int,
    file: str,
    licence: str,
    test_scores: Mapping[str, float],
) -> str:
    """Return a card with YAML front matter for model hubs.

    Args:
        model_file: of the model.
        facts: of its images.
        parameters: their number.
        file: name of the weights file next to the card.
        licence: of the weights.
        test_scores: role -> score on the test split, if known.
    """
    import yaml

    settings = recorded_settings(model_file.config, where="the model file's settings")
    data, model, method = (settings.get(name, {}) for name in ("data", "model", "method"))
    dataset = data.get("dataset", "unknown")
    distilled = method.get("method", "none") != "none"
    teacher = PurePath(model["teacher"]).name if distilled else None
    detection = facts.task == "detection"
    front = {
        "license": licence,
        "library_name": "raygkd",
        "pipeline_tag": "object-detection" if detection else "image-classification",
        "tags": ["raygkd", "knowledge-distillation", "pytorch"],
        "datasets": [dataset],
        "student": model_file.name,
        "teacher": teacher,
        "parameters": parameters,
        "image_size": facts.image_size,
        "scores": {**model_file.scores, **{f"test, {role}": s for role, s in test_scores.items()}},
    }
    mean, std = ([round(value, 6) for value in of] for of in (model_file.mean, model_file.std))
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {model_file.name} on {dataset}",
        "",
        f"A {'detector' if detection else 'classifier'} of {len(facts.class_names)} classes with "
        f"{parameters:,} parameters, written by raygkd {__version__}.",
        "",
        "## Data",
        "",
        f"Data set: {dataset}. Classes, in the order of the "
        f"{'labels' if detection else 'logits'}: {', '.join(facts.class_names)}.",
        "",
        "## Teacher and student",
        "",
        _lesson(model_file.name, teacher, method.get("method", "none")),
        "",
        *_started(model_file),
        "## Scores",
        "",
        *_scores_table(model_file.scores, test_scores),
        "",
        "## Input",
        "",
        f"RGB images of {facts.image_size} x {facts.image_size} pixels, {_RESIZE[facts.resize]}; "
        f"values in 0..1, minus the mean {mean}, divided by the standard deviation {std}.",
        "",
        "## Use",
        "",
        _USE.format(
            name=model_file.name,
            classes=len(facts.class_names),
            size=tuple(model_file.image_size),
            file=file,
        ),
        "",
        "## Settings",
        "",
        "```yaml",
        _public(settings),
        "```",
        "",
        "## Licence",
        "",
        f"{licence}",
        "",
    ]
    return "\n".join(lines)


def _lesson(student: str, teacher: str | None, method: str) -> str:
    if teacher is None:
        return f"{student} was trained without a teacher."
    return f"{student} was distilled from {teacher} with the method {method}."


def _started(model_file: ModelFile) -> list[str]:
    """Return the lines on the weights that training started from; none for random ones."""
    if not model_file.weights:
        return []
    weights = LoadedWeights.from_mapping(model_file.weights)
    lines = ["## Starting weights", "", f"Training started from {weights}.", ""]
    if weights.forbids_commercial_use:
        lines[3:3] = ["", "Their licence forbids commercial use."]
    return lines


def _scores_table(scores: Mapping[str, float], test_scores: Mapping[str, float]) -> list[str]:
    # these two are also there under the name of their metric
    named = {round(value, 6) for name, value in scores.items() if name not in _UNNAMED}
    rows = [
        (name, value)
        for name, value in scores.items()
        if name not in _UNNAMED or round(value, 6) not in named
    ]
    rows += [
        (f"test score, {role.replace('_', ' ')}", value) for role, value in test_scores.items()
    ]
    if not rows:
        return ["None is known."]
    return ["| | |", "| --- | --- |", *(f"| {name} | {value:.4f} |" for name, value in rows)]


def _public(settings: Mapping[str, Any]) -> str:
    """Return the settings of the training as YAML, without paths and addresses of this machine."""
    import yaml

    shown = {
        name: {
            key: PurePath(value).name if key in _PATHS and value else value
            for key, value in part.items()
            if value is not None
        }
        for name, part in settings.items()
        if name not in ("output", "cluster", "train", "search", "compare")
    }
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).strip()
