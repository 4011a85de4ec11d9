"""An output in an object store: what is refused, in one line and before anything is started."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from outcomes import Ran
from servers import ObjectStore, free_port

from raygkd.config import DataConfig
from raygkd.data.run_images import shards
from raygkd.storage.atomic_files import place, write_text

Refused = Callable[..., str]
SERVER = ("--tracking-uri", "http://127.0.0.1:9")


@pytest.mark.parametrize("command", ["train", "tune", "teacher"])
@pytest.mark.parametrize("store", [(), ("--tracking-uri", "sqlite:///mlflow.db")])
def test_it_needs_an_mlflow_server(
    refused: Refused, good: tuple[str, ...], command: str, store: tuple[str, ...]
) -> None:
    message = refused(command, *good, "--output", "s3://photos/out", *store)
    assert "--output s3://photos/out: needs --tracking-uri http://HOST:PORT" in message


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://me:hunter2@photos/out", "remove the user name and password"),
        ("s4://photos/out", "must be a path, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER"),
    ],
)
def test_urls_that_cannot_be_used(
    refused: Refused, good: tuple[str, ...], url: str, reason: str
) -> None:
    for message in (
        refused("train", *good, "--output", url, *SERVER),
        refused("train", "--resume", url),
    ):
        assert reason in message
        assert "hunter2" not in message


def test_images_of_a_url_with_a_password(refused: Refused) -> None:
    url = "s3://me:hunter2@photos/shards"
    message = refused("train", "--dataset", "parquet", "--data-dir", url)
    assert "s3://photos/shards: remove the user name and password" in message
    assert "hunter2" not in message


def test_a_bucket_that_does_not_exist(
    refused: Refused, good: tuple[str, ...], object_store: ObjectStore
) -> None:
    message = refused("train", *good, "--output", "s3://none/out", *SERVER)
    assert "--output s3://none/out: cannot be written" in message
    assert "bucket does not exist" in message


def test_a_store_that_is_not_there(
    refused: Refused,
    raygkd: Callable[..., Ran],
    good: tuple[str, ...],
    object_store: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    started = time.monotonic()
    message = refused("train", *good, "--output", "s3://photos/out", *SERVER)
    assert "--output s3://photos/out: cannot be written" in message
    assert "Could not connect to the endpoint" in message
    ran = raygkd("train", "--resume", "s3://photos/out")
    assert ran.code == 1
    assert ran.err.startswith("error: cannot read s3://photos/out/runs: Could not connect")
    assert ran.err.count("\n") == 1
    assert time.monotonic() - started < 30


def test_a_folder_without_a_run(refused: Refused, object_store: ObjectStore) -> None:
    url = f"{object_store.url}/nothing"
    assert f"--resume {url}: has no config.yaml" in refused("train", "--resume", url)


def test_a_teacher_that_is_not_there(
    refused: Refused, good: tuple[str, ...], object_store: ObjectStore, tmp_path: Path
) -> None:
    url = f"{object_store.url}/{tmp_path.name}/model.pt"
    message = refused("train", *good, "--teacher", url)
    assert f"--teacher: cannot read model file {url}: No such file or directory" in message


def test_the_ui_of_a_store(refused: Refused) -> None:
    assert "open the server that the runs used" in refused("ui", "--output", "s3://photos/out")


def test_shards_whose_preparation_was_broken_off_are_prepared_again(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    output = place(f"{object_store.url}/{tmp_path.name}")
    folder = place(shards(DataConfig(), output))
    whole = (folder / "part-00000.parquet").read_bytes()
    (folder / "_SUCCESS").unlink()
    write_text(folder / "part-00000.parquet", "")
    assert shards(DataConfig(), output) == str(folder)
    assert (folder / "part-00000.parquet").read_bytes() == whole
    # and then they are kept
    write_text(folder / "more", "")
    assert shards(DataConfig(), output) == str(folder)
    assert (folder / "more").exists()
