"""The settings of a training in 8 bits, from the finished run that it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raygkd.assembly.methods import reads_setting, uses_teacher
from raygkd.assembly.models import is_model_file
from raygkd.config import Config, check_keys, plain_names, to_mapping, with_settings
from raygkd.deploy.exporters.training_graph import EXPORT_INSTEAD
from raygkd.errors import ConfigError
from raygkd.metrics.ranking import NEAREST
from raygkd.models import is_detector, short_name
from raygkd.storage.atomic_files import Place, place
from raygkd.workflows.finished_run import FinishedRun, open_finished
from raygkd.workflows.results import BEST, BEST_STUDENT, STUDENT
from raygkd.workflows.resume import MODEL

# epochs and learning rate as shares of the run's
SHARE = 0.1
_ADVICE = "pass the folder of a finished run of 'raygkd train', 'tune' or 'compare'"


def settings_of_run(asked: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings of the run that ``--start-from`` names, for its training in 8 bits.

    Its teacher is the file that the run has used, and the student's initial weights are those of
    its student.

    Args:
        asked: section -> setting -> value, as given by the user.

    Raises:
        ConfigError: a run, or settings, that do not suit.
    """
    start, kind = (asked["train"].get(name) for name in ("start_from", "quantize"))
    if start is None:
        raise ConfigError(f"--quantize {kind}: needs --start-from; {_ADVICE}")
    if kind is None:
        raise ConfigError(f"--start-from {start}: needs --quantize int8; add it")
    if asked["train"].get("control"):
        raise ConfigError(
            "--control: with --quantize the student is compared with the one that it starts from; "
            "omit it"
        )
    check_keys(asked, where="options")
    run = open_finished(start, option="--start-from")
    settings = _in_8_bits(run)
    settings = _with_method(settings, asked.get("method", {}).get("method", settings.method.method))
    tree = plain_names(to_mapping(settings))
    # what is None is found out again, such as the size of the teacher's images
    return {
        section: {name: value for name, value in leaves.items() if value is not None}
        for section, leaves in tree.items()
        if section not in ("train", "search", "compare")
    }


def _in_8_bits(run: FinishedRun) -> Config:
    config = run.settings
    if run.trained not in (STUDENT, BEST):
        raise ConfigError(f"--start-from {run.folder}: has no student; {_ADVICE}")
    if is_detector(config.model.student):
        raise ConfigError(
            f"--start-from {run.folder}: its student {short_name(config.model.student)} is a "
            f"detector, and only classifiers can be trained in 8 bits; {EXPORT_INSTEAD}"
        )
    best = run.folder / BEST_STUDENT / MODEL
    model = best if best.exists() else run.folder / MODEL
    if not model.exists():
        raise ConfigError(f"--start-from {run.folder}: its {model.name} is gone; {_ADVICE}")
    optim = config.optim
    changes: dict[str, Any] = {
        "student_weights": str(model),
        "inherit": None,
        "epochs": max(1, round(SHARE * optim.epochs)),
        "lr": SHARE * optim.lr,
        "grace_period": 1,
        # a student that is trained already needs neither
        **{"warmup_epochs": 0.0, "freeze_epochs": 0, "backbone_lr_factor": 1.0, "layer_decay": 1.0},
        "patience": None,
        # bfloat16 is coarser than 8 bits
        **{"amp": "none", "compile": False},
        "name": None,
    }
    if config.data.score in NEAREST:
        changes["score"] = "auto"
    if uses_teacher(config):
        changes |= _teacher(run, config)
    return with_settings(config, changes)


def _teacher(run: FinishedRun, config: Config) -> dict[str, Any]:
    """Return the settings that give a run the teacher of another as a file."""
    given = run.result.get("teacher", {}).get("path")
    if given is None and is_model_file(config.model.teacher):
        given = config.model.teacher
    path: Place | None = None if given is None else place(given)
    if path is None or not path.exists():
        raise ConfigError(
            f"--start-from {run.folder}: the file of its teacher, {path}, is gone; pass another "
            "with --teacher, or --method none"
        )
    is_features = config.model.teacher_mode == "features"
    return {
        "teacher": str(path),
        "teacher_mode": "features" if is_features else "auto",
        **dict.fromkeys(("teacher_weights", "teacher_classes", "class_names", "prompts")),
    }


def _with_method(config: Config, method: str) -> Config:
    """Return settings with a method, and of the run's own for methods only those that it reads."""
    tree = to_mapping(config)
    own = plain_names({"method": tree["method"]})["method"]
    kept = {name: value for name, value in own.items() if reads_setting(method, name)}
    return Config(
        **{
            **{section: getattr(config, section) for section in tree},
            "method": with_settings(Config(), {**kept, "method": method}).method,
        }
    )
