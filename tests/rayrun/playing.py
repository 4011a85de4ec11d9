"""Plays scenes in the background, and says whose tests look at their outcomes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import commands_in
from filling import fill
from hanging import hang
from killing import kill
from scenes import Scene, Scenes, undisturbed
from spreading import spread
from storing import keep
from surroundings import by_thread
from watched import SCENES

from raygkd.assembly.models import untrained_file
from raygkd.data.spec import ImageSpec
from raygkd.models import save_model_file

PLAYS = {play.__name__: play for play in (spread, kill, keep, fill, hang, undisturbed)}


@contextlib.contextmanager
def playing(files: Collection[str], folder: Callable[[str], Path]) -> Iterator[Scenes]:
    """Begin the scenes that some files need, two at a time, since most of a scene is waiting.

    Args:
        files: names of files of tests.
        folder: returns a new folder of a name.
    """
    wanted = [scene for scene, users in SCENES.items() if users.intersection(files)]
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(2, initializer=by_thread(patch).keep))
        start = stack.enter_context(commands_in(folder))
        scene = Scene(start, untrained_teacher_in(folder("teacher")), folder, stack)
        yield {name: pool.submit(PLAYS[name], scene) for name in wanted}
        pool.shutdown(wait=False, cancel_futures=True)


def untrained_teacher_in(folder: Path) -> Path:
    """Return a model file of random weights for the digits, written to a folder."""
    spec = ImageSpec(
        class_names=tuple("0123456789"), image_size=(8, 8), mean=(0.3,) * 3, std=(0.4,) * 3
    )
    save_model_file(folder / "model.pt", untrained_file("resnet14", spec))
    return folder / "model.pt"
