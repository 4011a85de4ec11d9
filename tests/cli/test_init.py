"""``raygkd init``: the first commands that suit some images."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.core import ParameterSource
from outcomes import Ran, files
from torchvision.transforms.functional import to_pil_image

from raygkd.cli.main import commands
from raygkd.cli.options import resolve

pytestmark = pytest.mark.unit


def write(folder: Path, side: int, classes: int) -> None:
    """Write images to a folder per class, or to the folder itself if there are no classes."""
    for label in range(max(classes, 1)):
        inner = folder / f"class {label}" if classes else folder
        inner.mkdir(parents=True)
        for number in range(4):
            pixels_CHW = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
            to_pil_image(pixels_CHW).save(inner / f"{number}.png")


def check(command: str) -> None:
    """Check the options of a command as it would itself."""
    program, name, *words = shlex.split(command)
    assert program == "raygkd"
    if name in ("tune", "train", "compare"):
        context = commands.commands[name].make_context(name, list(words))
        given = {
            name: value
            for name, value in context.params.items()
            if context.get_parameter_source(name) == ParameterSource.COMMANDLINE
        }
        assert len(given) == len(words) // 2
        resolve(name, None, given, None)


@pytest.mark.parametrize(
    ("side", "classes", "told", "parts"),
    [
        (12, 3, "12 images of 3 classes (imagefolder)", ["data info", "--trials", "resnet8,"]),
        (80, 2, "8 images of 2 classes", ["data info", "torchvision:resnet50", "--objective"]),
        (12, 0, "4 images without labels", ["data info", "--unlabelled", "--student-weights"]),
    ],
)
def test_the_commands_suit_the_images(
    raygkd: Callable[..., Ran], tmp_path: Path, side: int, classes: int, told: str, parts: list[str]
) -> None:
    folder = tmp_path / "my photos"
    write(folder, side, classes)
    before = files(tmp_path)
    ran = raygkd("init", folder)
    assert ran.code == 0, ran.err
    first, *lines = ran.out.splitlines()
    assert first.startswith(f"{folder}: {told}")
    shown = [line.strip() for line in lines if line.startswith("  ")]
    assert all(part in command for part, command in zip(parts, shown, strict=True))
    assert str(folder) in shlex.split(shown[0])
    for command in shown:
        # which the user replaces by a folder
        if "LABELLED" not in command:
            check(command)
    assert files(tmp_path) == before
    listed = json.loads(raygkd("init", folder, "--json").out)["commands"]
    assert [one["command"] for one in listed] == shown


def test_there_are_commands_without_images(raygkd: Callable[..., Ran]) -> None:
    ran = raygkd("init")
    shown = [line.strip() for line in ran.out.splitlines() if line.startswith("  ")]
    assert shown[0] == "raygkd doctor"
    check(shown[1])


def test_a_missing_folder_is_refused(raygkd: Callable[..., Ran], tmp_path: Path) -> None:
    ran = raygkd("init", tmp_path / "nowhere")
    assert ran.code == 2
    assert ran.err.startswith("error: no file or folder")
