"""Names and places at the limits of a system: one line, or done."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from outcomes import Ran

from raygkd.cli import main
from raygkd.data import normalisation
from raygkd.errors import ConfigError, ResourceError, StorageError, TrackingError
from raygkd.rayrun.cluster import cluster
from raygkd.storage.atomic_files import local_path, place, whole_file
from raygkd.storage.temporary import _UNFINISHED
from raygkd.tracking.store import chosen_uri
from raygkd.workflows.model_locator import new_folder

pytestmark = pytest.mark.unit


def refused(raygkd: Callable[..., Ran], *arguments: str | Path) -> str:
    """Return the only error of a command."""
    ran = raygkd(*arguments)
    assert ran.code == 2
    [line] = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127, "a" * 128, "a"])
def test_a_file_may_have_the_longest_name(tmp_path: Path, name: str) -> None:
    with whole_file(tmp_path / name) as temporary:
        temporary.write_text("whole")
        # what a killed process leaves is found by its name
        assert _UNFINISHED.fullmatch(temporary.name)
        assert len(os.fsencode(temporary.name)) <= 255
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "whole")]


def test_a_name_of_a_run_that_is_too_long(raygkd: Callable[..., Ran], tmp_path: Path) -> None:
    line = refused(raygkd, "train", "--name", "x" * 201, "--output", tmp_path)
    assert line.startswith("--name 'xxxx")
    assert "at most 200, and start with" in line


@pytest.mark.parametrize("make", [place, local_path])
@pytest.mark.parametrize("text", ["s3:/bucket/x", "gs:bucket", "s3:"])
def test_a_url_of_a_store_without_its_slashes(make: Callable[[str], Any], text: str) -> None:
    with pytest.raises(ConfigError, match=f"the URL of an object store starts with {text[:3]}//"):
        make(text)


@pytest.mark.parametrize("output", ["http://host/x", "s3://bucket?x=1", "ftp://x"])
def test_an_output_that_is_no_store_is_not_told_to_need_a_server(
    raygkd: Callable[..., Ran], output: str
) -> None:
    line = refused(raygkd, "train", "--output", output)
    assert line.startswith(f"--output {output}: must be a path, s3://BUCKET/FOLDER or gs://")


@pytest.mark.parametrize("dataset", ["digits", "cluttered-digits"])
def test_a_folder_of_a_data_set_that_has_none(
    raygkd: Callable[..., Ran], tmp_path: Path, dataset: str
) -> None:
    options = ("--dataset", dataset, "--data-dir", "nowhere", "--output", tmp_path / "out")
    for command in (("data", "prepare"), ("train",)):
        line = refused(raygkd, *command, *options)
        assert line == f"--data-dir nowhere: --dataset {dataset} has no folder; omit it"


def test_weights_of_a_teacher_that_is_trained_are_called_its_own(
    raygkd: Callable[..., Ran], tmp_path: Path
) -> None:
    torch.save({"another.weight": torch.ones(2, 2)}, tmp_path / "weights.pt")
    options = ("--limit-train", "60", "--batch-size", "16", "--output", tmp_path / "out")
    line = refused(raygkd, "teacher", "--teacher-weights", tmp_path / "weights.pt", *options)
    assert line.startswith("--teacher-weights: ")


def test_the_url_of_a_dashboard_is_no_address() -> None:
    told = "^no Ray cluster at http://host:8265: it is the URL of a dashboard, not HOST:PORT; start"
    with pytest.raises(ResourceError, match=told), cluster("http://host:8265"):
        pass


def test_a_cluster_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray._private.services as services

    # as Ray finds it by the processes of a cluster that is ending
    monkeypatch.setattr(services, "canonicalize_bootstrap_address", lambda address: "127.0.0.1:9")
    told = r"^no Ray cluster at auto: .*Connection refused"
    with pytest.raises(ResourceError, match=told), cluster("auto"):
        pass


@pytest.mark.parametrize(
    "uri", ["https://", "http://[::1", "http://host:99999", "http://:5000", "http://host:x"]
)
def test_a_server_without_a_host_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uri: str
) -> None:
    told = "names no server; write https?://HOST:PORT$"
    with pytest.raises(TrackingError, match=f"^--tracking-uri .*: {told}"):
        chosen_uri(uri, str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError, match=f"^MLFLOW_TRACKING_URI .*: {told}"):
        chosen_uri(None, str(tmp_path))


@pytest.mark.parametrize("kind", ["pipe", "loop", "file", "below a file"])
def test_a_folder_for_pictures_that_is_something_else(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "there"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.touch()
    given = path / "in it" if kind == "below a file" else path
    with pytest.raises(ResourceError, match=f"^--out {given}: cannot be created: "):
        new_folder("--out", str(given))


def test_a_folder_for_pictures_may_begin_with_a_tilde(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert new_folder("--out", "~/a/b") == tmp_path / "a" / "b"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_limit_of_file_sizes_is_told_as_a_full_disk(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match=r"^cannot write .*/file: File too large$"),
        whole_file(tmp_path / "file"),
    ):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


def test_too_little_memory_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(**options: Any) -> None:
        np.empty(2**55, np.uint8)

    monkeypatch.setattr(sys, "argv", ["raygkd", "doctor"])
    monkeypatch.setattr(main.commands, "main", work)
    assert main.run() == 1
    told = r"error: the memory of this machine is not enough \(Unable to allocate .*\)\n"
    assert re.fullmatch(told, capsys.readouterr().err)


def test_statistics_of_large_images_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    class Large:
        def blank(self) -> dict[str, NDArray[np.uint8]]:
            return {"image": np.zeros((3, 4096, 4096), np.uint8)}

    class Table:
        path = "images"
        units = type("Units", (), {"first": np.zeros(1000, np.int64)})

    def load(table: Any, window: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(window))
        images = np.ones((len(window), 3, 2, 2), np.uint8)
        return type("Window", (), {"arrays": {"image": images}})

    monkeypatch.setattr(normalisation, "load_window", load)
    mean, _ = normalisation.channel_statistics(Table(), np.arange(20), Large(), limit=20)
    assert max(sizes) * 3 * 4096**2 <= normalisation.WINDOW_BYTES
    assert sum(sizes) == 20
    assert mean == pytest.approx((1 / 255,) * 3)
