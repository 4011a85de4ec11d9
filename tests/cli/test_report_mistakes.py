"""``raygkd report`` on what it cannot report on: one line, exit code 2, and nothing written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from outcomes import Ran

from raygkd.config import Config, to_yaml

Refused = Callable[..., str]


# what every result has
RESULT = {"seconds": 1.0, "mlflow": {"tracking_uri": "sqlite:///x"}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that has begun."""
    folder = tmp_path / "output" / "runs" / "tune-one"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(Config()))
    (folder / "facts.json").write_text("{}")
    return folder


def test_a_folder_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    error = refused("report", tmp_path / "none")
    assert "none: has no config.yaml; pass an output folder, or the folder of a run" in error


def test_an_output_folder_without_a_finished_run(refused: Refused, run: Path) -> None:
    error = refused("report", run.parents[1])
    assert "output: has no finished run; start one with: raygkd tune --output " in error


def test_a_run_that_is_not_over(refused: Refused, run: Path) -> None:
    error = refused("report", run)
    assert "the run is not finished" in error
    assert f"resume it with: raygkd tune --resume {run}" in error


def test_a_place_that_is_none_of_a_stores(refused: Refused) -> None:
    assert "OUTPUT ftp://host/folder" in refused("report", "ftp://host/folder")


def test_a_damaged_result(refused: Refused, run: Path) -> None:
    (run / "result.json").write_text('{"best": ')
    assert f"{run}/result.json is damaged" in refused("report", run)


@pytest.mark.parametrize("name", ["result.json", "facts.json"])
def test_a_file_that_is_a_list(refused: Refused, run: Path, name: str) -> None:
    (run / "result.json").write_text(json.dumps(RESULT))
    (run / name).write_text("[]")
    assert f"{run}/{name} is damaged (it must contain keys and values" in refused("report", run)


def test_a_warm_start_from_a_search_without_trials(
    raygkd: Callable[..., Ran], run: Path, good: tuple[str, ...]
) -> None:
    (run / "result.json").write_text(json.dumps(RESULT))
    ran = raygkd("tune", *good, "--warm-start", run)
    assert (ran.code, ran.out) == (2, "")
    assert f"error: --warm-start {run}: has no trial with a score" in ran.err


def test_a_page_where_a_folder_is(refused: Refused, run: Path, tmp_path: Path) -> None:
    (run / "result.json").write_text(json.dumps(RESULT))
    error = refused("report", run, "--html", tmp_path)
    assert f"--html {tmp_path}: is a folder; pass the name of a file, such as index.html" in error


def test_images_that_are_not_those_of_the_run(
    raygkd: Callable[..., Ran], run: Path, parquet: Callable[..., Path]
) -> None:
    config = re.sub("dataset: digits", "dataset: parquet", to_yaml(Config()))
    config = re.sub("data_dir: null", f"data_dir: {parquet()}", config)
    (run / "config.yaml").write_text(config)
    (run / "facts.json").write_text(
        json.dumps({"data set, fingerprint of images and splits": "0123456789abcdef"})
    )
    models = {"models": {"student": {"model": "resnet8", "parameters": 1, "test_score": 0.5}}}
    (run / "result.json").write_text(json.dumps(RESULT | models))
    ran = raygkd("report", run)
    assert (ran.code, ran.out) == (2, "")
    assert "the images have changed since the run" in ran.err
    assert "; restore them" in ran.err
    assert not (run / "report").exists()
