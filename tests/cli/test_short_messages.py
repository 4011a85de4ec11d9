"""What people type may be long or far away: the answer is short, and comes soon."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from outcomes import Ran

from raygkd.cli.main import MOST_LINES
from raygkd.data import parquet
from raygkd.errors import DataError

pytestmark = pytest.mark.unit

LONG = "x" * 3000


@pytest.mark.parametrize(
    "options",
    [
        ("--teacher", LONG),
        ("--student", LONG),
        ("--student", f"{LONG}:f"),
        ("--dataset", LONG),
        ("--teacher-weights", f"{LONG}/weights.pt"),
    ],
)
def test_a_long_value_is_shortened(
    raygkd: Callable[..., Ran], tmp_path: Path, options: tuple[str, ...]
) -> None:
    ran = raygkd("train", *options, "--limit-train", "60", "--output", tmp_path / "out")
    assert ran.code == 2
    [line] = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(line) < 600


def test_of_many_problems_some_are_printed(raygkd: Callable[..., Ran], tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("".join(f"unknown{number}: 1\n" for number in range(500)))
    ran = raygkd("train", "--config", file)
    assert ran.code == 2
    *first, last = ran.err.splitlines()
    assert (len(first), last) == (MOST_LINES, f"error: {500 - MOST_LINES} more like these")


def test_a_section_in_a_search_space(raygkd: Callable[..., Ran], tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text("optim: {lr: {values: [0.1, 0.2]}}\n")
    ran = raygkd("tune", "--space", file)
    assert (ran.code, ran.err) == (
        2,
        f"error: {file}: 'optim': a search space has no sections; list its settings alone\n",
    )


def test_images_of_which_none_can_be_read(raygkd: Callable[..., Ran], tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([b"junk"] * 4), "label": [0, 1, 0, 1]})
    pq.write_table(table, tmp_path / "junk.parquet")
    ran = raygkd("init", tmp_path / "junk.parquet")
    assert ran.code == 2
    assert "none of its images can be read" in ran.err


@pytest.mark.parametrize("uri", ["s3://", "gs://", "gs:///"])
def test_a_store_without_a_bucket(uri: str) -> None:
    with pytest.raises(DataError, match="names no bucket"):
        parquet.resolve(uri)


def test_googles_store_is_not_waited_for_without_an_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # no server and no account, as far as the client can see
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("GCE_METADATA_ROOT", "127.0.0.1:9")
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(parquet, "GCS_SECONDS", 1)
    started = time.monotonic()
    with pytest.raises(DataError, match="cannot read 'gs://raygkd-nowhere/x'"):
        parquet.open_table("gs://raygkd-nowhere/x")
    assert time.monotonic() - started < 60
