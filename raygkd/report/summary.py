"""First section of a report: the run and its outcome."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from raygkd.config import Config, flag, given, settings, text_of, value_of
from raygkd.registry import METRICS
from raygkd.report.page import Block, Section, Table, Words
from raygkd.report.tables import score_text, show, teacher_note

# what a training of a teacher alone sets by itself
_OF_TEACHER_ALONE = {"student", "student_weights", "inherit", "method", "levels"}

# score -> what it is
_SCORES = {
    "accuracy": "the accuracy, the fraction of images classified correctly, from 0 to 1",
    "map": "the mean average precision over IoU 0.5 to 0.95 (mAP), from 0 to 1",
    "map50": "the mean average precision at IoU 0.5 (mAP50), from 0 to 1",
    "knn": "the accuracy of a vote of the nearest labelled training images, from 0 to 1",
    "agreement": "the share of images to which student and teacher give the same class, 0 to 1",
    "cka": "the linear CKA of the student's features with the teacher's, from 0 to 1",
}


def summary_section(
    *,
    command: str,
    config: Config,
    models: Mapping[str, Mapping[str, Any]],
    params: Mapping[str, Any] | None,
    facts: Sequence[tuple[str, str]],
    score: str,
    seeds: int,
    notes: Sequence[str] = (),
) -> Section:
    """Return the section on the run and its outcome.

    Args:
        command: of the run.
        config: its settings.
        models: role -> "model", "parameters" and "test_score".
        params: of the best trial of a search.
        facts: name and value of other facts about the run.
        score: what the test score is; unused without models.
        seeds: how many seeds the search was repeated with.
        notes: sentences on the outcome, such as the verdict.
    """
    blocks: list[Block] = [Words(note) for note in notes]
    if models:
        blocks += [Words(outcome(models, seeds)), _models_table(models, score)]
    if {"teacher", "student alone"} <= models.keys():
        teacher, alone = (models[role]["test_score"] for role in ("teacher", "student alone"))
        if note := teacher_note(teacher, alone, score):
            blocks.append(Words(note))
    blocks.append(Words(command_line(command, config), is_command=True))
    if params:
        rows = [(name, show(value)) for name, value in params.items()]
        blocks.append(Table(("best settings", ""), rows, texts=2))
    blocks.append(Table(("the run", ""), facts, texts=2))
    return Section(
        anchor="summary",
        title="Summary",
        blocks=blocks,
        numbers={"models": {role: dict(model) for role, model in models.items()}},
    )


def outcome(models: Mapping[str, Mapping[str, Any]], seeds: int) -> str:
    """Return in words how the last model compares with the others.

    Args:
        models: role -> "model", "parameters" and "test_score".
        seeds: how many seeds the search was repeated with.
    """
    *others, role = models
    own = models[role]
    if own["test_score"] is None:
        return f"The {role} ({own['model']}) learned without labels, so it has no test score."
    text = f"The {role} ({own['model']}) scores {own['test_score']:.4f} on the test images"
    others = [other for other in others if models[other]["test_score"] is not None]
    if not others:
        return f"{text}."
    words = {"teacher": "the teacher", "student alone": "the same student without a teacher"}
    leads = [_lead(own, models[other], words[other]) for other in reversed(others)]
    text += f": {' and '.join(leads)}"
    if "teacher" in models:
        share = 100 * own["parameters"] / models["teacher"]["parameters"]
        text += f", with {share:.0f}% of the teacher's parameters"
    if seeds:
        return f"{text}. These scores are from one seed; those of {seeds} more are below."
    return f"{text}. These scores are from one seed; another seed gives different ones."


def _lead(own: Mapping[str, Any], other: Mapping[str, Any], name: str) -> str:
    lead = own["test_score"] - other["test_score"]
    if lead == 0:
        return f"equal to {name}"
    return f"{abs(lead):.4f} {'above' if lead > 0 else 'below'} {name}"


def _models_table(models: Mapping[str, Mapping[str, Any]], score: str) -> Table:
    largest = max(model["parameters"] for model in models.values())
    *_, last = models.values()
    measured = last.get("test_metrics", {})
    others = [n for n in measured if n == "top5" or (n in METRICS.names() and n != score)]
    rows = [
        (
            role,
            model["model"],
            f"{model['parameters']:,}",
            f"{100 * model['parameters'] / largest:.0f}%",
            score_text(model["test_score"]),
            *(score_text(model["test_metrics"].get(name)) for name in others),
        )
        for role, model in models.items()
    ]
    header = ("", "model", "parameters", "size", "test score")
    what = _SCORES[score] if score in _SCORES else f"the {METRICS.get(score).label()}"
    columns = (*header, *(_title(name) for name in others))
    return Table(columns, rows, texts=2, note=f"The score is {what}.")


def _title(name: str) -> str:
    """Return what a column of a test metric is called."""
    return METRICS.get(name).label() if name in METRICS.names() else "top-5 accuracy"


def command_line(command: str, config: Config) -> str:
    """Return a command that repeats the run, with the settings that are not defaults.

    Args:
        command: its name.
        config: its settings.
    """
    named = given(config) - (_OF_TEACHER_ALONE if command == "teacher" else set())
    words = ["raygkd", command, "--dataset", config.data.dataset]
    for name in settings():
        value = value_of(config, name)
        if name not in named or name == "dataset" or value is None:
            continue
        if "." in name:
            words += ["--set", f"{name}={text_of(value)}"]
        elif isinstance(value, bool):
            words.append(flag(name) if value else f"--no-{name.replace('_', '-')}")
        else:
            words += [flag(name), text_of(value)]
    return shlex.join(words)
