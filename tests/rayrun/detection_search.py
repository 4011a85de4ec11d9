"""A small search for detectors on a folder of scenes in VOC's layout."""

from __future__ import annotations

from pathlib import Path

from commands import Command
from untrained import untrained_file

from raygkd.build import ImageSpec
from raygkd.data.scenes import write_scenes
from raygkd.models import save_model_file

SIDE, TRIALS = 96, 2
SPEC = ImageSpec(
    class_names=tuple("0123456789"),
    image_size=(SIDE, SIDE),
    mean=(0.3,) * 3,
    std=(0.2,) * 3,
    task="detection",
)
TUNE = (
    *("tune", "--dataset", "voc", "--trials", TRIALS, "--epochs", 2, "--scheduler", "none"),
    *("--student", "fcos_mobilenet_v3_small_fpn16"),
    *("--image-size", SIDE, "--batch-size", 8, "--seed", 3, "--json"),
)


def start(folder: Path, output: Path) -> Command:
    """Start the search; its data and the teacher of random weights lie in ``folder``."""
    write_scenes(folder / "voc", images={"train": 24, "val": 8, "test": 8})
    teacher = folder / "teacher.pt"
    save_model_file(teacher, untrained_file("fcos_resnet18_fpn16", SPEC))
    given = ("--teacher", teacher, "--data-dir", folder / "voc", "--output", output)
    return Command(folder, *TUNE, *given)
