"""The first commands that suit some images: ``raygkd init``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from raygkd.cli.data_commands import dataset_info
from raygkd.cli.options import JSON, only_results_on_stdout
from raygkd.errors import DataError, to_paste

# longest side of images, in pixels, for which the small built-in models suit
SMALL = 64
PRETRAINED = ("--teacher", "torchvision:resnet50")
STUDENT = "torchvision:mobilenet_v3_small"
STUDENTS = f"{STUDENT},timm:mobilenetv4_conv_small,torchvision:resnet18"
FOUNDATION = ("--teacher", "timm:vit_small_patch14_dinov2.lvd142m")
TRIALS = ("--trials", "16")


@click.command()
@click.argument("folder", required=False)
@JSON
def init(folder: str | None, as_json: bool) -> None:
    """Show which commands to run first, for your images or for built-in ones.

    FOLDER is a folder of images in any supported layout, or a Parquet file. Nothing is written.
    """
    with only_results_on_stdout() as out:
        info = None if folder is None else dataset_info(folder)
        commands = _without_images() if info is None else _for_images(info)
        if as_json:
            shown = [{"purpose": purpose, "command": command} for purpose, command in commands]
            out.write(json.dumps({"folder": folder, "commands": shown}) + "\n")
            return
        if info is not None:
            out.write(f"{folder}: {_summary(info)}\n\n")
        for purpose, command in commands:
            out.write(f"{purpose}:\n  {command}\n")


def _summary(info: Mapping[str, Any]) -> str:
    """Return what the folder holds, in words."""
    images, classes = f"{info['images']:,} images", len(info["classes"])
    if not classes:
        return f"{images} without labels"
    kind = "with boxes of" if "boxes" in info else "of"
    return f"{images} {kind} {classes} classes ({info['dataset'] or 'parquet'})"


def _without_images() -> list[tuple[str, str]]:
    first = ("tune", "--dataset", "cluttered-digits", "--trials", "4", "--teacher-epochs", "6")
    small = ("--epochs", "5", "--batch-size", "32")
    return [
        ("check this machine", to_paste("doctor")),
        ("try a search on built-in digits", to_paste(*first, *small)),
        ("see which commands suit your images", "raygkd init FOLDER"),
    ]


def _for_images(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    path = info["path"]
    look = ("look at the images and their faults", to_paste("data", "info", path))
    if not info["classes"]:
        without = ("train", "--unlabelled", path, *FOUNDATION, "--student", STUDENT)
        weights = "raygkd-output/runs/train-without-labels/model.pt"
        return [
            look,
            ("train without labels", to_paste(*without, "--name", "without-labels")),
            (
                "continue with a few labelled images",
                f"raygkd train --data-dir LABELLED --student {STUDENT} --student-weights {weights}",
            ),
        ]
    if "boxes" in info:
        return [
            look,
            ("search for a detector", to_paste("tune", "--data-dir", path, *TRIALS)),
            ("compare methods", to_paste("compare", "--data-dir", path, "--methods", "graph,fgd")),
        ]
    if not info["width"]:
        raise DataError(
            f"{path}: none of its images can be read; see {to_paste('data', 'info', path)}"
        )
    is_small = max(info["width"]["max"], info["height"]["max"]) <= SMALL
    teacher = () if is_small else PRETRAINED
    student = () if is_small else ("--student", STUDENT)
    students = "resnet8,resnet14,resnet20" if is_small else STUDENTS
    front = ("--students", students, "--objective", "score,latency")
    return [
        look,
        (
            "search for the best settings of a student",
            to_paste("tune", "--data-dir", path, *teacher, *student, *TRIALS),
        ),
        (
            "choose a student by score and latency (needs the extra 'export')",
            to_paste("tune", "--data-dir", path, *teacher, *front, *TRIALS),
        ),
    ]
