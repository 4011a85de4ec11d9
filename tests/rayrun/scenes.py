"""What searches go through in scenes that take minutes, and the same search undisturbed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import Command

TRIALS, EPOCHS = 4, 24
# a search without a teacher to learn from is over when its trials are; one at a time they have one
# order: the first trains all epochs, the others are stopped after 1, 1 and 4
TUNE = (
    *("tune", "--dataset", "digits", "--limit-train", "256", "--student", "resnet8"),
    *("--method", "none", "--trials", TRIALS, "--epochs", EPOCHS, "--reduction-factor", "2"),
    *("--max-concurrent", "1", "--seed", "3", "--json"),
)
# name of a scene -> its outcome
Scenes = Mapping[str, Future[Any]]


@dataclass(frozen=True)
class Scene:
    """What a scene has.

    Attributes:
        start: starts a command.
        teacher: a model file.
        folder: returns a new folder of a name.
        stack: closes what must not outlive the tests.
    """

    start: Callable[..., Command]
    teacher: Path
    folder: Callable[[str], Path]
    stack: contextlib.ExitStack


def undisturbed(scene: Scene) -> dict[str, Any]:
    """Return the result of the search that nobody disturbs."""
    output = scene.folder("undisturbed")
    return scene.start(*TUNE, "--teacher", scene.teacher, "--output", output).result()
