"""First section of a report: the run and its outcome."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from raygkd.config import Config, flag, given, settings, text_of, value_of
from raygkd.report.page import Block, Section, Table, Words
from raygkd.report.tables import show, teacher_note

# what a training of a teacher alone sets by itself
_OF_TEACHER_ALONE = {"student", "student_weights", "inherit", "method", "levels"}

# score -> its name
SCORES = {
    "accuracy": "the accuracy, the fraction of images classified correctly",
    "map": "the mean average precision over IoU 0.5 to 0.95 (mAP)",
    "map50": "the mean average precision at IoU 0.5 (mAP50)",
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
) -> Section:
    """Return the section on the run and its outcome.

    Args:
        command: of the run.
        config: its settings.
        models: role -> "model", "parameters" and "test_score".
        params: of the best trial of a search.
        facts: name and value of other facts about the run.
        score: kind of the test score, a key of ``SCORES``; unused without models.
        seeds: how many seeds the search was repeated with.
    """
    blocks: list[Block] = []
    if models:
        blocks += [Words(outcome(models, seeds)), _models_table(models, score)]
    if {"teacher", "student alone"} <= models.keys():
        scores = (models[role]["test_score"] for role in ("teacher", "student alone"))
        if note := teacher_note(*scores):
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
    text = f"The {role} ({own['model']}) scores {own['test_score']:.4f} on the test images"
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
    rows = [
        (
            role,
            model["model"],
            f"{model['parameters']:,}",
            f"{100 * model['parameters'] / largest:.0f}%",
            f"{model['test_score']:.4f}",
        )
        for role, model in models.items()
    ]
    header = ("", "model", "parameters", "size", "test score")
    return Table(header, rows, texts=2, note=f"The score is {SCORES[score]}, from 0 to 1.")


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
