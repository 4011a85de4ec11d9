"""`raygkd data`: shards from real images, and what is told about them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from outcomes import PROGRESS, Ran
from PIL import Image

from raygkd.cli import options
from raygkd.data.parquet import open_table


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digits") / "shards"


@pytest.fixture
def prepared(digits: Path, raygkd: Callable[..., Ran]) -> Path:
    """The digits' shards, prepared once."""
    if not digits.exists():
        assert raygkd("data", "prepare", "--dataset", "digits", "--output", digits).code == 0
    return digits


def test_preparing_digits_ends_with_what_to_do_next(
    raygkd: Callable[..., Ran], tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    ran = raygkd("data", "prepare", "--dataset", "digits", "--output", shards)
    assert ran.code == 0
    first, last = ran.out.splitlines()
    assert first.startswith("1797 images of 10 classes (train 1438, val 0, test 359) in 1 shard")
    assert last == f"next: raygkd tune --dataset parquet --data-dir {shards}"
    assert all(line.startswith(PROGRESS) for line in ran.err.splitlines())
    assert ran.err.splitlines()[-1] == "preparing images: 1797/1797"
    assert len(open_table(str(shards))) == 1797


def test_preparing_images_with_boxes_ends_with_models_for_them(
    raygkd: Callable[..., Ran], tmp_path: Path
) -> None:
    ran = raygkd("data", "prepare", "--dataset", "digits-voc", "--output", tmp_path / "shards")
    teacher, student = "fasterrcnn_resnet18_fpn64", "fasterrcnn_mobilenet_v3_small_fpn64"
    assert ran.out.splitlines()[-1].endswith(f" --teacher {teacher} --student {student}")


def test_skipped_images_are_counted_and_named(
    raygkd: Callable[..., Ran], tree: Callable[..., Path], tmp_path: Path
) -> None:
    root = tree(cat=4, dog=4)
    (root / "dog" / "2.png").write_bytes(b"no image")
    command = ("data", "prepare", "--dataset", "imagefolder", "--data-dir", root, "--skip-bad")
    ran = raygkd(*command, "--output", tmp_path / "one")
    assert ran.code == 0
    assert ran.out.startswith("7 images of 2 classes (train 7, val 0, test 0) in 1 shard(s)")
    assert f"skipped 1 unreadable images: {root}/dog/2.png: not a complete image" in ran.out
    result = json.loads(raygkd(*command, "--output", tmp_path / "two", "--json").out)
    assert (result["images"], result["bad"], result["path"]) == (7, 1, str(tmp_path / "two"))
    assert result["bad_examples"][0].startswith(f"{root}/dog/2.png: not a complete image")


def test_info_shows_counts_and_classes_and_writes_a_sheet(
    raygkd: Callable[..., Ran], prepared: Path, tmp_path: Path
) -> None:
    sheet = tmp_path / "samples.png"
    ran = raygkd("data", "info", prepared, "--sheet", sheet)
    assert (ran.code, ran.err) == (0, "")
    lines = [line.strip() for line in ran.out.splitlines()]
    assert "images      1,797 (train 1,438, val 0, test 359)" in lines
    assert "width       min 8, median 8, max 8 pixels" in lines
    assert "9        144    0    36" in lines
    assert lines[-1] == f"sample sheet: {sheet}"
    with Image.open(sheet) as image:
        assert image.format == "PNG"
        assert min(image.size) > 500


def test_info_as_json_is_all_there_is_on_stdout(
    raygkd: Callable[..., Ran], prepared: Path, tmp_path: Path
) -> None:
    sheet = tmp_path / "samples.png"
    ran = raygkd("data", "info", prepared, "--sheet", sheet, "--json")
    assert (ran.code, ran.err) == (0, "")
    info = json.loads(ran.out)
    assert (info["images"], info["dataset"], info["sheet"]) == (1797, "digits", str(sheet))
    assert info["classes"]["9"] == {"train": 144, "val": 0, "test": 36}
    assert sheet.is_file()


def test_noise_of_libraries_is_kept_off_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    with options.only_results_on_stdout() as out:
        os.write(1, b"noise")
        out.write("result")
    os.write(1, b" and more")
    assert capfd.readouterr() == ("result and more", "noise")


def test_info_about_a_foreign_file(
    raygkd: Callable[..., Ran], parquet: Callable[..., Path], tmp_path: Path
) -> None:
    path = parquet(cut_off=[3])
    ran = raygkd("data", "info", path, "--sheet", tmp_path / "samples.png")
    assert ran.code == 0
    assert "(not prepared by raygkd)" in ran.out
    assert "3 classes" in ran.out
    assert "class-2" in ran.out


def test_sheet_that_cannot_be_written(
    refused: Callable[..., str], prepared: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    sheet = tmp_path / "file" / "samples.png"
    error = refused("data", "info", prepared, "--sheet", sheet)
    assert f"error: cannot write '{sheet}': Not a directory" in error


def test_info_about_nothing(refused: Callable[..., str], tmp_path: Path) -> None:
    error = refused("data", "info", tmp_path / "gone")
    assert (
        f"no file or folder '{tmp_path}/gone'; pass a folder of images or a .parquet file" in error
    )


def test_folder_is_recognised_and_reported(
    raygkd: Callable[..., Ran], tree: Callable[..., Path], tmp_path: Path
) -> None:
    root = tree(cat=4, dog=4)
    ran = raygkd("data", "prepare", "--data-dir", root, "--output", tmp_path / "shards")
    assert ran.code == 0
    assert ran.err.splitlines()[0] == f"data set: imagefolder (folders cat, dog in {root})"
    assert ran.out.startswith("8 images of 2 classes")


@pytest.mark.parametrize("command", [("data", "prepare", "--output", "shards"), ("tune",)])
def test_folder_that_is_nothing_known_is_refused(
    refused: Callable[..., str], tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "empty").mkdir()
    error = refused(*command, "--data-dir", tmp_path / "empty")
    assert f"'{tmp_path}/empty' is empty; choose the folder of the images" in error


def test_info_about_a_folder_of_images_names_faults_and_writes_nothing(
    raygkd: Callable[..., Ran], tree: Callable[..., Path], workplace: Path
) -> None:
    root = tree(cat=4, dog=1)
    (root / "dog" / "notes.txt").write_text("")
    ran = raygkd("data", "info", root, "--json")
    assert ran.code == 0
    info = json.loads(ran.out)
    assert (info["images"], info["dataset"], info["formats"]) == (5, "imagefolder", {"PNG": 5})
    assert info["classes"] == {
        "cat": {"train": 4, "val": 0, "test": 0},
        "dog": {"train": 1, "val": 0, "test": 0},
    }
    assert info["warnings"] == [
        f"skipped 1 file with the suffix .txt, first in {root}/dog/notes.txt",
        "found 1 class with a single image, first in imagefolder ('dog')",
    ]
    assert "warning" in raygkd("data", "info", root).out
    assert not (workplace / "sheet.png").exists()
