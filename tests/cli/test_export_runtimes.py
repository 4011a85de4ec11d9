"""``raygkd export`` to runtimes other than onnxruntime, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from outcomes import Ran, files

Refused = Callable[..., str]
NAMES = ("class-0", "class-1", "class-2")


def test_openvino_in_8_bits_is_measured_and_read(
    raygkd: Callable[..., Ran],
    model_file: Callable[..., Path],
    parquet: Callable[..., Path],
    tmp_path: Path,
) -> None:
    source, data = model_file(*NAMES), parquet()
    before, out = files(tmp_path), tmp_path / "small.xml"
    command = ("export", source, "--format", "openvino", "--out", out, "--data", data)
    ran = raygkd(*command, "--quantize", "int8", "--json")
    assert ran.code == 0, ran.err
    assert files(tmp_path) - before == {out, tmp_path / "small.bin"}
    result = json.loads(ran.out)
    int8 = result["int8"]
    assert (result["format"], result["opset"]) == ("openvino", None)
    assert result["check"]["largest"] <= 1e-4
    assert (int8["kind"], int8["layers"]) == ("int8", 22)
    assert int8["score_before"] - int8["score"] <= 0.005
    assert result["bytes"] == sum(out.with_suffix(one).stat().st_size for one in (".xml", ".bin"))
    assert all(int8["latency_ms"][name]["median"] > 0 for name in ("float32", "int8"))
    ran = raygkd("predict", out, data, "--top", "1")
    assert ran.code == 0, ran.err
    rows = [json.loads(line) for line in ran.out.splitlines()]
    assert len(rows) == 60
    assert {one["predictions"][0]["class"] for one in rows} <= set(NAMES)


def test_refusals_leave_both_files(
    refused: Refused,
    model_file: Callable[..., Path],
    parquet: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, out = model_file(*NAMES), tmp_path / "small.xml"
    for name in ("small.xml", "small.bin"):
        (tmp_path / name).write_text("kept")
    command = ("export", source, "--format", "openvino", "--out", out)
    error = refused(*command, "--quantize", "dynamic")
    assert error == "error: --quantize dynamic: needs --format onnx, not openvino; omit it\n"
    error = refused(*command, "--quantize", "int8")
    assert "--quantize int8: needs training images: the model file does not record" in error
    error = refused("export", source, "--format", "openvino", "--out", tmp_path / "a.onnx")
    assert "a.onnx: must end with .xml" in error
    error = refused("predict", out, parquet())
    assert "small.xml is damaged or not an OpenVINO model" in error
    # as good as not there, for whoever imports or looks for it
    monkeypatch.setitem(sys.modules, "openvino", None)
    error = refused(*command)
    assert error == "error: --format openvino: needs openvino: pip install 'raygkd[openvino]'\n"
    error = refused("predict", out, parquet())
    assert "small.xml: needs openvino: pip install 'raygkd[openvino]'" in error
    assert {(tmp_path / name).read_text() for name in ("small.xml", "small.bin")} == {"kept"}


def test_folder_in_the_place_of_the_weights(
    refused: Refused, model_file: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "small.bin").mkdir()
    out = ("--format", "openvino", "--out", tmp_path / "small.xml")
    error = refused("export", model_file(*NAMES), *out)
    assert error.endswith(f"small.xml: there is a folder '{tmp_path}/small.bin'; choose another\n")


def test_executorch_in_8_bits_is_measured_and_read(
    raygkd: Callable[..., Ran],
    refused: Refused,
    model_file: Callable[..., Path],
    parquet: Callable[..., Path],
    tmp_path: Path,
) -> None:
    pytest.importorskip("executorch", reason="the extra executorch is not installed")
    source, data, out = model_file(*NAMES), parquet(), tmp_path / "small.pte"
    command = ("export", source, "--format", "executorch", "--out", out, "--data", data)
    ran = raygkd(*command, "--quantize", "int8", "--max-drop", "3", "--json")
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    int8 = result["int8"]
    assert result["check"]["largest"] <= 1e-4
    assert (int8["kind"], int8["layers"]) == ("int8", 22)
    assert int8["score_before"] - int8["score"] <= 0.03
    assert result["bytes"] == out.stat().st_size
    ran = raygkd("predict", out, data, "--top", "1")
    assert ran.code == 0, ran.err
    assert len([json.loads(line) for line in ran.out.splitlines()]) == 60
    out.write_bytes(b"nothing of the kind")
    error = refused("predict", out, data)
    assert "small.pte is damaged or not an ExecuTorch program" in error


def test_extra_of_executorch(
    refused: Refused,
    model_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "executorch", None)
    out = ("--format", "executorch", "--out", tmp_path / "model.pte")
    error = refused("export", model_file(*NAMES), *out)
    assert (
        error == "error: --format executorch: needs executorch: pip install 'raygkd[executorch]'\n"
    )
