"""Mutated files give values, or one line that names the fault; never another exception."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import (
    coco_contents,
    encode_image,
    tar_members,
    write_coco,
    write_table,
    write_tar,
    write_voc,
    write_yolo,
)

from raygkd.data import decode, open_source
from raygkd.data.audit import audit
from raygkd.data.parquet import open_table
from raygkd.data.prepare import prepare
from raygkd.errors import UserError

CAT = ("cat", 1, 1, 9, 9)
TOKENS = [
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"-1", b"1e999", b"nan", b"null", b"[]", b"{}", b'"',
    b"'", b"<", b">", b"&x;", b",", b"\n", b"#", b"../", b"/" * 300, b"9" * 400, b"\xe7\x8c\xab",
    b"[" * 2000, b"utf-16", b"gbk", b"!!python/name:os.system", b"*a", b"true",
]  # fmt: skip
# place of a change, bytes that it removes, and bytes that it inserts
CHANGES = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.one_of(st.integers(0, 8), st.integers(0, 4000)),
        st.one_of(st.sampled_from(TOKENS), st.binary(max_size=6)),
    ),
    min_size=1,
    max_size=4,
)


def voc(root: Path) -> list[Path]:
    write_voc(root, {"a": [CAT], "b": [CAT, CAT]}, {"train": ["a", "b"], "test": ["a"]})
    path = root / "Annotations" / "a.xml"
    path.write_text(f"<?xml version='1.0' encoding='utf-8'?>{path.read_text()}")
    return [path, root / "ImageSets" / "Main" / "train.txt", root / "JPEGImages" / "a.jpg"]


def coco(root: Path) -> list[Path]:
    images = {"a.jpg": [(1, 0, 0, 9, 9)], "b.jpg": [(2, 4, 4, 8, 8)]}
    write_coco(root / "labels.json", root, coco_contents(images, {1: "cat", 2: "dog"}))
    return [root / "labels.json"]


def yolo(root: Path) -> list[Path]:
    labels = {"a": "0 0.5 0.5 0.2 0.4\n1 0.1 0.1 0.4 0.1 0.4 0.5", "b": "1 0.5 0.5 0.2 0.2"}
    write_yolo(root, {"train": labels, "val": {"c": ""}}, ["cat", "dog"])
    (root / "list.txt").write_text("./images/val/c.jpg\n")
    path = root / "data.yaml"
    path.write_text(path.read_text() + "path: .\ntest: [list.txt, images/*/]\nnc: 2\n")
    return [path, root / "labels" / "train" / "a.txt", root / "list.txt"]


def labels_csv(root: Path) -> list[Path]:
    rows = [["image", "label", "split"], ["a.png", "cat", "train"], ["b.png", "dog", "val"]]
    write_table(root / "t.csv", rows)
    return [root / "t.csv"]


def boxes_csv(root: Path) -> list[Path]:
    rows = [["image", "label", "xmin", "ymin", "xmax", "ymax", "width", "height"]]
    rows += [["a.png", "cat", 1, 2, 9, 8, 40, 30], ["b.png", "dog", 0, 0, 5, 5, 40, 30]]
    write_table(root / "t.csv", rows)
    return [root / "t.csv"]


def webdataset(root: Path) -> list[Path]:
    members = tar_members("1", "2") | {"x.png": encode_image(9), "x.json": b'{"label": "1"}'}
    return [write_tar(root / "train-0.tar", members)]


FORMATS: dict[str, tuple[str, Callable[[Path], list[Path]]]] = {
    "voc": ("voc", voc),
    "coco": ("coco", coco),
    "yolo": ("yolo", yolo),
    "labels.csv": ("csv", labels_csv),
    "boxes.csv": ("csv", boxes_csv),
    "webdataset": ("webdataset", webdataset),
}
EXAMPLES = [
    pytest.param(60, id="few"),
    pytest.param(400, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
]
# the same inputs every time: a fault of a decoder may end the process
FUZZ = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def mutated(content: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    for place, removed, inserted in changes:
        at = int(place * len(content))
        content = content[:at] + inserted + content[at + removed :]
    return content


def check_line(error: Exception) -> None:
    assert str(error).strip()
    assert "\n" not in str(error)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", FORMATS)
def test_mutated_annotations(tmp_path, name, examples):
    dataset, write = FORMATS[name]
    files = write(tmp_path)
    originals = {path: path.read_bytes() for path in files}
    assert open_source(dataset, tmp_path).samples

    @settings(FUZZ, max_examples=examples)
    @given(file=st.sampled_from(files), changes=CHANGES, strict=st.booleans())
    def check(file: Path, changes: list[tuple[float, int, bytes]], strict: bool) -> None:
        file.write_bytes(mutated(originals[file], changes))
        try:
            source = open_source(dataset, tmp_path, strict=strict)
            audit(source, strict=strict)
            for sample in source.samples:
                assert 0 <= sample.label < len(source.class_names)
                if sample.boxes is not None and len(sample.boxes):
                    assert np.isfinite(sample.boxes.xyxy).all()
                    assert sample.boxes.label.max() < len(source.class_names)
        except UserError as error:
            check_line(error)
        finally:
            file.write_bytes(originals[file])

    check()


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("is_ours", [True, False])
def test_mutated_parquet(tmp_path, make_source, is_ours, examples):
    path = tmp_path / "out" / "part-00000.parquet"
    if is_ours:
        prepare(make_source(6), str(path.parent))
        content, metadata = path.read_bytes(), pq.read_schema(path).metadata[b"raygkd"]
    else:
        path.parent.mkdir()
        pq.write_table(pa.table({"image": [encode_image()] * 2, "label": [0, 1]}), path)
        content, metadata = path.read_bytes(), json.dumps({"classes": "a,b"}).encode()
    schema = pq.read_schema(path)

    @settings(FUZZ, max_examples=examples)
    @given(changes=CHANGES, in_metadata=st.booleans())
    def check(changes: list[tuple[float, int, bytes]], in_metadata: bool) -> None:
        path.write_bytes(mutated(content, changes))
        if in_metadata:
            table = pq.read_table(pa.BufferReader(content))
            key = b"raygkd" if is_ours else b"classes"
            changed = {**(schema.metadata or {}), key: mutated(metadata, changes)}
            pq.write_table(table.replace_schema_metadata(changed), path)
        try:
            table = open_table(str(path))
            table.read(np.arange(len(table)))
            assert len(table.class_names) > table.labels.max()
        except UserError as error:
            check_line(error)

    check()


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "AVIF", "JPEG2000"])
def test_mutated_images(kind, examples):
    content = encode_image(size=(24, 16), kind=kind)

    @settings(FUZZ, max_examples=examples)
    @given(changes=CHANGES)
    def check(changes: list[tuple[float, int, bytes]]) -> None:
        try:
            image_CHW = decode(mutated(content, changes))
            assert image_CHW.shape[0] == 3
        except ValueError as error:
            check_line(error)

    check()
