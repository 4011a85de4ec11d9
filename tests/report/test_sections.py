"""What a report says in words, and what it measures."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raygkd.cli.run_commands import tune
from raygkd.config import Config, from_mapping, settings
from raygkd.metrics.latency import FEWEST, WARM_UP, hardware, latencies
from raygkd.report.examples import Example, Prediction, examples_section
from raygkd.report.page import Picture, Section, Table, Words, page
from raygkd.report.summary import command_line, outcome, summary_section

TREE = {
    "data": {"dataset": "imagefolder", "data_dir": "my photos", "skip_bad": True},
    "method": {"levels": [1, 3], "temperature": 0.25},
    "cluster": {"workers": "1-2"},
    "optim": {"lr": 0.125},
    "search": {"trials": 3},
}


def model(name: str, parameters: int, score: float) -> dict[str, Any]:
    return {"model": name, "parameters": parameters, "test_score": score}


def test_the_outcome_is_told_with_its_leads() -> None:
    models = {
        "teacher": model("resnet20", 200, 0.9),
        "student alone": model("resnet8", 50, 0.7),
        "best student": model("resnet8", 50, 0.8),
    }
    assert outcome(models, 0) == (
        "The best student (resnet8) scores 0.8000 on the test images: 0.1000 above the same "
        "student without a teacher and 0.1000 below the teacher, with 25% of the teacher's "
        "parameters. These scores are from one seed; another seed gives different ones."
    )
    models["best student"] = model("resnet8", 50, 0.7)
    assert "equal to the same student without a teacher and 0.2000 below" in outcome(models, 0)
    assert outcome(models, 3).endswith("from one seed; those of 3 more are below.")
    assert outcome({"teacher": models["teacher"]}, 0) == (
        "The teacher (resnet20) scores 0.9000 on the test images."
    )


@pytest.mark.parametrize(("teacher", "is_told"), [(0.8, False), (0.7, True)])
def test_a_teacher_that_is_no_better_than_the_student_alone_is_told_on_the_page(
    teacher: float, is_told: bool
) -> None:
    models = {
        "teacher": model("resnet20", 200, teacher),
        "student alone": model("resnet8", 50, 0.7),
        "best student": model("resnet8", 50, 0.75),
    }
    section = summary_section(
        command="tune",
        config=Config(),
        models=models,
        params=None,
        facts=[("trials", "3")],
        score="accuracy",
        seeds=0,
    )
    html = page("T", "S", [section], [])
    assert ("The teacher (0.7000) is no better than the student alone (0.7000)" in html) == is_told


def test_the_command_that_is_shown_makes_the_same_settings() -> None:
    config = from_mapping(TREE)
    program, command, *arguments = shlex.split(command_line("tune", config))
    assert (program, command) == ("raygkd", "tune")
    context = tune.make_context("tune", list(arguments))
    known = settings()
    tree: dict[str, dict[str, Any]] = {}
    for name, value in context.params.items():
        if name in known and value is not None:
            tree.setdefault(known[name][0], {})[name] = value
    assert from_mapping(tree) == config


def test_the_command_of_a_default_run_is_short() -> None:
    assert command_line("tune", Config()) == "raygkd tune --dataset digits"


def test_a_page_shows_all_texts_as_they_are() -> None:
    hostile = '<img src="http://127.0.0.1/x" onerror="throw 1"> &amp; {{ 1 + 1 }}'
    escaped = (
        "&lt;img src=&#34;http://127.0.0.1/x&#34; onerror=&#34;throw 1&#34;&gt; &amp;amp; "
        "{{ 1 + 1 }}"
    )
    blocks = [Words(hostile), Words(hostile, True), Table([hostile], [[hostile]], note=hostile)]
    section = Section(anchor="a", title=hostile, blocks=blocks)
    html = page(hostile, hostile, [section], [hostile])
    assert "<img" not in html
    assert html.count(escaped) == 11
    assert "http" not in html.replace(escaped, "").replace("http-equiv", "")


def test_a_picture_is_inside_the_page(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    section = Section(
        anchor="a", title="A", blocks=[Picture(tmp_path / "a.png", "name", "words", is_wide=True)]
    )
    html = page("T", "S", [section], [])
    assert '<img src="data:image/png;base64,iVBORw==" alt="name">' in html
    assert "left-out" not in html


def example(label: int, **said: int) -> Example:
    guesses = {
        role.replace("_", " "): Prediction(label=guess, probability=0.5 + 0.1 * guess)
        for role, guess in said.items()
    }
    return Example(image=np.zeros((8, 8, 3), np.uint8), label=label, said=guesses)


def test_examples_are_sorted_by_who_is_right(tmp_path: Path) -> None:
    examples = [
        *(example(0, teacher=0, best_student=1), example(1, teacher=1, best_student=0)),
        *(example(1, teacher=0, best_student=1), example(2, teacher=2, best_student=2)),
    ]
    names = ["a", "$b", "c" * 40]
    section = examples_section(tmp_path, examples, names, ["teacher", "best student"])
    assert section.numbers == {
        "images": 4,
        "teacher right, best student wrong": 2,
        "best student right, teacher wrong": 1,
        "both wrong": 0,
        "both right": 1,
    }
    assert len(section.pictures) == len(list(tmp_path.iterdir())) == 3


def test_examples_of_one_model_are_right_or_wrong(tmp_path: Path) -> None:
    examples = [example(0, teacher=0), example(1, teacher=0), example(1, teacher=2)]
    section = examples_section(tmp_path, examples, ["a", "b", "c"], ["teacher"])
    assert section.numbers == {"images": 3, "teacher wrong": 2, "teacher right": 1}


class Noted(nn.Module):
    """A model that notes its calls."""

    def __init__(self, name: str, calls: list[tuple[str, float]], work: int):
        super().__init__()
        self.name, self.calls, self.work = name, calls, work

    def forward(self, images_BCHW: Tensor) -> Tensor:
        assert images_BCHW.shape == (1, 3, 4, 4)
        self.calls.append((self.name, float(images_BCHW[0, 0, 0, 0])))
        square = torch.rand(self.work, self.work)
        return square @ square


def test_models_are_timed_by_turns_with_one_image_at_a_time() -> None:
    calls: list[tuple[str, float]] = []
    images_BCHW = torch.arange(3.0)[:, None, None, None].expand(3, 3, 4, 4)
    models = {name: Noted(name, calls, work) for name, work in (("small", 2), ("large", 400))}
    told: list[tuple[int, int]] = []
    timed = latencies(
        {name: (model, images_BCHW) for name, model in models.items()},
        lambda done, total: told.append((done, total)),
    )
    assert [name for name, _ in calls[:4]] == ["small", "large", "small", "large"]
    assert {value for _, value in calls} == {0.0, 1.0, 2.0}
    assert timed["small"].runs == timed["large"].runs == len(calls) // 2 - WARM_UP >= FEWEST
    assert timed["small"].median < timed["large"].median <= timed["large"].p95
    assert told[-1][0] == timed["small"].runs


def test_the_hardware_is_named_with_threads() -> None:
    assert f"{torch.get_num_threads()} thread(s)" in hardware()
    assert hardware().count(",") == 4
