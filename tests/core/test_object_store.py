"""Files in an object store, an S3 server of this machine, beside those of a folder."""

from __future__ import annotations

import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from servers import ObjectStore, free_port

from raygkd.engine import read_checkpoint
from raygkd.errors import ConfigError, DataError, StorageError
from raygkd.models import build_model, load_model_file
from raygkd.models.weights import load_weights
from raygkd.storage.atomic_files import (
    Place,
    local_copy,
    place,
    remove_folder,
    whole_file,
    write_text,
)
from raygkd.storage.object_store import RemotePath


@pytest.fixture
def bucket(object_store: ObjectStore, tmp_path: Path) -> Place:
    return place(f"{object_store.url}/{tmp_path.name}/")


# places


def test_a_place_is_an_absolute_path_or_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert place("tmp/../out") == Path("/out")
    assert place("s3://photos/out/") == RemotePath("s3://photos/out")
    assert str(place("s3://photos/out") / "runs" / "a.b") == "s3://photos/out/runs/a.b"
    assert (place("s3://photos") / "runs").parent == place("s3://photos")
    assert (place("s3://photos") / "runs").name == "runs"


@pytest.mark.parametrize(
    "url",
    ["s4://photos/out", "s3://", "s3:///out", "s3://photos//out", "s3://photos/o*t", "s3://p?a"],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="must be a path, s3://BUCKET/FOLDER or gs://"):
        place(url)


@pytest.mark.parametrize("user", ["me:hunter2", "hunter2", "me:hunter2@more"])
def test_a_password_is_refused_and_not_shown(user: str) -> None:
    with pytest.raises(ConfigError, match="remove the user name and password") as error:
        place(f"s3://{user}@photos/out")
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("scheme", "package", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")]
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, scheme: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs {package}: pip install 'raygkd\[{extra}\]'"):
        place(f"{scheme}://photos/out")


# files


def test_text_is_read_as_it_was_written(folder: Place) -> None:
    assert not (folder / "a.txt").exists()
    for text in ("one", "another"):
        write_text(folder / "a.txt", text)
        assert (folder / "a.txt").read_text() == text
    assert folder.exists()
    assert folder.is_dir()
    assert not (folder / "a.txt").is_dir()


def test_what_is_in_a_folder(folder: Place) -> None:
    for name in ("a", "b/c", "b/d"):
        parent, _, file = name.rpartition("/")
        write_text((folder / parent if parent else folder) / file, name)
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    assert sorted(path.name for path in (folder / "b").iterdir()) == ["c", "d"]
    (folder / "a").unlink()
    remove_folder(folder / "b")
    assert not (folder / "a").exists()
    assert not (folder / "b" / "c").exists()
    remove_folder(folder / "b")


def test_a_file_appears_whole_or_not_at_all(bucket: Place, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with whole_file(bucket / "model.pt") as temporary:
        temporary.write_bytes(b"first")
        assert not (bucket / "model.pt").exists()
    with pytest.raises(UnicodeEncodeError), whole_file(bucket / "model.pt") as temporary:
        temporary.write_text("half of the sec\udc00", encoding="utf-8")
    with local_copy(bucket / "model.pt") as copy:
        assert copy.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_several_uploads_comes_back(bucket: Place) -> None:
    content = bytes(range(256)) * (480 << 10)
    with whole_file(bucket / "large") as temporary:
        temporary.write_bytes(content)
    with local_copy(bucket / "large") as copy:
        assert copy.read_bytes() == content


def test_other_processes_find_the_same_place(bucket: Place) -> None:
    write_text(bucket / "a", "text")
    sent = pickle.loads(pickle.dumps(bucket / "a"))
    assert sent == bucket / "a"
    assert sent.read_text() == "text"


def test_a_missing_file_is_told_as_on_a_disk(folder: Place) -> None:
    with pytest.raises(FileNotFoundError) as error:
        (folder / "none").read_bytes()
    assert error.value.strerror == "No such file or directory"
    with pytest.raises(DataError, match="No such file or directory"):
        read_checkpoint(folder / "none")


# what goes wrong


def read_weights(path: Place) -> None:
    load_weights(build_model("ssdlite_mobilenet_v3_small_fpn64", 2, (64, 64)), str(path))


def test_a_missing_bucket_is_told(object_store: ObjectStore) -> None:
    with pytest.raises(StorageError, match=r"cannot write s3://none/a: .*does not exist"):
        write_text(place("s3://none/a"), "text")


@pytest.mark.parametrize(
    "ask",
    [
        *(RemotePath.exists, RemotePath.is_dir, RemotePath.unlink),
        # not as files that are damaged
        *(read_checkpoint, load_model_file, read_weights),
    ],
)
def test_a_store_that_is_not_there_is_told_in_seconds(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Place], object]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    started = time.monotonic()
    with pytest.raises(StorageError, match="s3://photos/a: Could not connect"):
        ask(place("s3://photos/a"))
    assert time.monotonic() - started < 15


def test_missing_credentials_are_told(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(StorageError, match="cannot read s3://photos/a: Unable to locate cred"):
        place("s3://photos/a").exists()


def test_a_store_that_hangs_is_given_up(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raygkd.storage.object_store._WRITE_SECONDS", 1.0)
    target = place(f"{object_store.url}/hanging")
    assert not target.exists()
    object_store.pause()
    try:
        for write in (lambda: write_text(target, "text"), lambda: target.write_bytes(b"text")):
            with pytest.raises(StorageError, match=r"cannot write .*/hanging: no answer"):
                write()
    finally:
        object_store.go_on()
