"""Progress and tables, in terminals and in logs."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table

from raygkd.report.console import WarningsToConsole, console_of, progress
from raygkd.report.figures import Curve, draw_search
from raygkd.report.tables import (
    classes_table,
    info_table,
    levels_table,
    missing_scores,
    models_table,
    repeat_table,
    show,
    teacher_note,
    trials_table,
)

PARAMS = {"lr": 0.123456, "levels": [1, 2, 3], "temperature": 1.23456, "dim": 8, "alpha": 0.0312}
MORE = {"beta": 1.2, "gamma": 0.1, "kd_temperature": 4.0, "kd_weight": 0.5}


def trial(epochs: int, val_score: float | None, **params: Any) -> dict[str, Any]:
    status = "failed" if val_score is None else "finished"
    return {"params": params, "epochs": epochs, "val_score": val_score, "status": status}


def lines_of(table: Table, width: int = 80) -> list[str]:
    """Return the lines of a table in a terminal that is so many columns wide."""
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=True, color_system=None).print(table)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in file.getvalue()
    return [line.rstrip() for line in lines]


def rows_of(table: Table, width: int = 80) -> list[str]:
    """Return the lines of a table with single spaces."""
    return [" ".join(line.split()) for line in lines_of(table, width)]


# progress


def test_progress_in_a_log_is_lines_at_the_tenths() -> None:
    file = io.StringIO()
    with progress(console_of(file), "training [it]") as advance:
        for done in range(31):
            advance(done, 30, f"val {done / 30:.2f}")
    lines = file.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "training [it]: 0/30 val 0.00"
    assert lines[-1] == "training [it]: 30/30 val 1.00"


def test_progress_of_nothing_prints_nothing() -> None:
    file = io.StringIO()
    with progress(console_of(file), "preparing images"):
        pass
    assert file.getvalue() == ""


def test_progress_on_a_terminal_is_one_bar_that_goes_away() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80)
    with progress(console, "trials (2 at a time)") as advance:
        advance(3, 8, "2 running, 15 epochs, best val 0.9861")
    shown = file.getvalue()
    assert "trials (2 at a time)" in shown
    assert "3/8" in shown
    assert "2 running, 15 epochs, best val 0.9861" in shown
    assert shown.endswith("\x1b[1A\x1b[2K")


def test_a_log_has_wide_lines_and_a_warning_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = io.StringIO()
    assert console_of(file).width == 160
    monkeypatch.setattr(sys, "stderr", file)
    text = "word " * 100 + "[end]"
    WarningsToConsole().emit(logging.makeLogRecord({"msg": text, "levelname": "WARNING"}))
    assert file.getvalue() == f"warning: {text}\n"


# tables


def test_settings_are_short() -> None:
    values = [None, 0.123456, 1e-5, [1, 2], (3,), "graph+kd", 8, True]
    texts = ["-", "0.123", "1e-05", "1,2", "3", "graph+kd", "8", "True"]
    assert [show(value) for value in values] == texts


def test_trials_are_ranked_with_settings_epochs_and_score() -> None:
    rows = rows_of(trials_table([trial(5, 0.98765, lr=0.1), trial(2, None, lr=0.05)]), 160)
    assert "1 0.9877 5 finished lr=0.1" in rows
    assert "2 - 2 failed lr=0.05" in rows


@pytest.mark.parametrize("params", [PARAMS, PARAMS | MORE])
@pytest.mark.parametrize("width", [80, 160])
def test_every_setting_of_a_trial_is_whole_and_below_its_like(
    params: dict[str, Any], width: int
) -> None:
    short = params | {"lr": 0.1, "levels": [1], "temperature": 1.0}
    lines = lines_of(trials_table([trial(5, 0.9, **params), trial(10, 0.8, **short)]), width)
    body = lines[4:-1]
    first, second = body[: len(body) // 2], body[len(body) // 2 :]
    for name, value in params.items():
        place = [(row, line.find(f"{name}=")) for row, line in enumerate(first) if name in line]
        assert f"{name}={show(value)}" in " ".join(first).split()
        for row, column in place:
            assert second[row].find(f"{name}=") == column


def test_a_search_without_trials_has_an_empty_table() -> None:
    assert rows_of(trials_table([]))[2] == "# val score epochs status settings"


def test_models_are_compared_in_size_and_score() -> None:
    rows = [("teacher", "torchvision:mobilenet_v3_large", 123_456_789, 0.91234)]
    rows += [("best student", "resnet8", 12_345_679, 0.9)]
    assert rows_of(models_table(rows))[0] == "Models on the test split"
    shown = rows_of(models_table(rows, 2000))
    assert shown[0] == "Models on 2,000 images of the test split"
    assert "teacher torchvision:mobilenet_v3_large 123,456,789 100% 0.9123" in shown
    assert "best student resnet8 12,345,679 10% 0.9000" in shown


@pytest.mark.parametrize(("teacher", "is_told"), [(0.9, False), (0.8, True), (0.7, True)])
def test_a_teacher_that_is_no_better_than_the_student_alone_is_told(
    teacher: float, is_told: bool
) -> None:
    note = teacher_note(teacher, 0.8)
    assert (note is not None) == is_told
    if note is not None:
        assert note.startswith(f"The teacher ({teacher:.4f}) is no better than the student alone")


def test_a_student_that_is_nearly_perfect_needs_no_better_teacher() -> None:
    note = teacher_note(1.0, 1.0)
    assert note is not None
    assert note.startswith("The student alone (1.0000) needs no teacher (1.0000)")
    assert teacher_note(1.0, 0.995) is None


def test_other_seeds_are_shown_with_their_spread_and_what_is_missing() -> None:
    repeat = {
        "models": {
            "best": {"test_scores": [0.9, 0.8], "mean": 0.85, "std": 0.070711},
            "student_alone": {"test_scores": [0.95, 0.8], "mean": 0.875, "std": 0.10607},
            "kd": {"test_scores": [0.7, None], "mean": None, "std": None},
        },
        "best_minus": {
            "student_alone": {"differences": [-0.05, 0.05], "mean": -1e-18, "std": 0.070711},
            "kd": {"differences": [0.2, None], "mean": None, "std": None},
        },
    }
    shown = rows_of(repeat_table("resnet8", repeat))
    assert shown[2] == "model seeds mean std"
    assert shown[4:-1] == [
        "best resnet8 2 0.8500 0.0707",
        "student alone resnet8 2 0.8750 0.1061",
        "kd resnet8 1 of 2 - -",
        "best - student alone 2 +0.0000 0.0707",
        "best - kd 1 of 2 - -",
    ]


def test_a_repeat_without_a_score_is_told_with_the_reason() -> None:
    trials: list[dict[str, Any]] = [
        {"role": "best", "seed": 4, "status": "finished", "error": None},
        {"role": "student_alone", "seed": 4, "status": "diverged", "error": None},
        {"role": "kd", "seed": 5, "status": "failed", "error": "no space left"},
    ]
    assert missing_scores({"trials": trials}) == [
        "no score of student alone with seed 4: diverged",
        "no score of kd with seed 5: no space left",
    ]


def test_levels_are_shown_with_shapes_and_adapters() -> None:
    level = {
        "level": 2,
        "teacher_shape": (2048, 112, 112),
        "student_shape": (512, 56, 56),
        "grid": (56, 56),
        "adapter": "1x1 conv 512 -> 2048",
        "spectral_pairs": 15,
        "spectral_dim": 64,
    }
    row = "2:3 512x56x56 2048x112x112 56x56 1x1 conv 512 -> 2048 15 of 64"
    assert row in rows_of(levels_table([level], {2: 3}))


def test_many_classes_are_counted() -> None:
    counts = {f"class-{label}": {"train": 1000, "test": label} for label in range(45)}
    shown = rows_of(classes_table(counts))
    assert "class-39 1,000 39" in shown
    assert "and 5 more (--json has all)" in shown
    assert not any("class-40" in row for row in shown)


def test_names_with_brackets_and_colons_are_shown_as_they_are() -> None:
    file = io.StringIO()
    console_of(file).print(classes_table({"[bold]dog :cat:": {"train": 1}}))
    assert "[bold]dog :cat:" in file.getvalue()


def test_info_without_a_readable_image() -> None:
    info = {
        "path": "x.parquet",
        "dataset": "",
        "images": 2,
        "unlabelled": 0,
        "files": 1,
        "bytes": 10,
        "warnings": [],
    }
    info |= {"splits": {"train": 2}, "formats": {}, "sampled": 2, "bad": 2}
    shown = rows_of(info_table(info | {"width": {}, "height": {}}))
    assert "unreadable 2 of those" in shown
    assert "width -" in shown


# figures


def colours_of(path: Path) -> set[str]:
    """Return which of the figure's colours a picture holds."""
    known = {"best": (0, 114, 178), "rung": (86, 180, 233), "broken": (213, 94, 0)}
    with Image.open(path) as picture:
        held = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or []}
    return {name for name, colour in known.items() if colour in held}


def test_a_search_is_drawn_with_its_best_trial_and_how_the_others_ended(tmp_path: Path) -> None:
    curves = [
        Curve(status="finished", scores={1: 0.4, 2: 0.7}),
        Curve(status="finished", scores={1: 0.3, 2: 0.5}),
        Curve(status="diverged", scores={1: 0.0}),
        Curve(status="failed", scores={}),
    ]
    others = {"teacher": 0.9, "student alone": 0.45}
    draw_search(tmp_path / "all.png", curves, others, rungs=[1])
    assert colours_of(tmp_path / "all.png") == {"best", "rung", "broken"}
    draw_search(tmp_path / "one.png", curves[:1], {})
    assert colours_of(tmp_path / "one.png") == {"best"}
    assert {path.name for path in tmp_path.iterdir()} == {"all.png", "one.png"}
