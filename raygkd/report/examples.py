"""Report section on images that models classify correctly and incorrectly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raygkd.report.attention_maps import shortened
from raygkd.report.figures import BLUE, VERMILION, new_figure, save
from raygkd.report.page import Block, Picture, Section, Table, Words

# of a sheet, which is larger where the models disagree
COLUMNS, MOST = 4, 8


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A model's prediction for an image.

    Attributes:
        label: of the class.
        probability: of the class, by the model.
    """

    label: int
    probability: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """An image with its label and the predictions for it.

    Attributes:
        image: RGB (H, W, 3).
        label: of the image.
        said: role -> prediction.
    """

    image: NDArray[np.uint8]
    label: int
    said: Mapping[str, Prediction]

    def is_right(self, role: str) -> bool:
        """Return whether a model predicts the label."""
        return self.said[role].label == self.label


def examples_section(
    folder: Path, examples: Sequence[Example], class_names: Sequence[str], roles: Sequence[str]
) -> Section:
    """Return the section on examples of a classifier, with its pictures drawn.

    Args:
        folder: for the pictures.
        examples: of the test split, at least one.
        class_names: by label.
        roles: the teacher, unless it is the only model, and the model that the report is about.
    """
    student = roles[-1]
    groups = _with_teacher(examples, student) if len(roles) > 1 else _alone(examples, student)
    rows = [
        (title, str(len(group)), f"{100 * len(group) / len(examples):.1f}%")
        for title, group in groups.items()
    ]
    blocks: list[Block] = [
        Words(f"Predictions on {len(examples)} random test images:"),
        Table(("", "images", "share"), rows),
    ]
    for number, (title, group) in enumerate(groups.items(), start=1):
        if not group:
            continue
        path = folder / f"examples-{number}.png"
        # the surest come first: these are the telling ones
        ranked = sorted(group, key=lambda example: -example.said[student].probability)
        draw_examples(path, ranked[: COLUMNS if title.startswith("both") else MOST], class_names)
        blocks.append(Picture(path, title.capitalize(), _READ, is_wide=True))
    return Section(
        anchor="examples",
        title="Right and wrong",
        blocks=blocks,
        numbers={"images": len(examples), **{title: len(group) for title, group in groups.items()}},
    )


_READ = (
    "Above each image is its label, below it the models' predictions with their probabilities; "
    "images are sorted by the student's confidence."
)


def _with_teacher(examples: Sequence[Example], student: str) -> dict[str, list[Example]]:
    titles = {
        (True, False): f"teacher right, {student} wrong",
        (False, True): f"{student} right, teacher wrong",
        (False, False): "both wrong",
        (True, True): "both right",
    }
    groups: dict[str, list[Example]] = {title: [] for title in titles.values()}
    for example in examples:
        key = example.is_right("teacher"), example.is_right(student)
        groups[titles[key]].append(example)
    return groups


def _alone(examples: Sequence[Example], role: str) -> dict[str, list[Example]]:
    return {
        f"{role} wrong": [example for example in examples if not example.is_right(role)],
        f"{role} right": [example for example in examples if example.is_right(role)],
    }


def detections_section(sheet: Path, per_class: Path) -> Section:
    """Return the section on a detector's examples, with the pictures of its run."""
    return Section(
        anchor="examples",
        title="Right and wrong",
        blocks=[
            Picture(
                sheet,
                "Detections on test images",
                "Blue boxes are the objects, orange boxes the student's detections, with their "
                "scores. An orange box on a blue one of the same class is correct.",
                is_wide=True,
            ),
            Picture(
                per_class,
                "Average precision of each class",
                "AP50 of each class on the test images: 1 means that all objects were found, with "
                "no false detections.",
            ),
        ],
    )


def draw_examples(path: Path, examples: Sequence[Example], class_names: Sequence[str]) -> None:
    """Write a PNG of images with their labels and predictions.

    Args:
        path: of the picture.
        examples: at least one.
        class_names: by label.
    """
    rows = math.ceil(len(examples) / COLUMNS)
    lines = len(examples[0].said)
    figure = new_figure(rows * (1.75 + 0.24 * (lines + 1)))
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, example in zip(grid.flat, examples):
        image = example.image
        axes.imshow(image, interpolation="nearest" if len(image) < 64 else "auto")
        axes.set_title(shortened(class_names[example.label]), fontsize=10, parse_math=False)
        for line, (role, said) in enumerate(example.said.items()):
            mark = "\u2713" if example.is_right(role) else "\u2717"
            text = shortened(class_names[said.label])
            axes.annotate(
                f"{mark} {role.split()[-1]}: {text} {said.probability:.2f}",
                (0.5, 0),
                (0, -9 - 13 * line),
                xycoords="axes fraction",
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=8.5,
                color=BLUE if example.is_right(role) else VERMILION,
                parse_math=False,
            )
    save(figure, path)
