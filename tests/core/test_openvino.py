"""OpenVINO models say what the model says, in float and in 8 bits.

Shapes: B batch, S side of the square input.
"""

from __future__ import annotations

from pathlib import Path

import openvino
import pytest
import torch
from lively import CLASSES, classifier_file, detector_file
from torch import Tensor

from raygkd.deploy.exporters.openvino import OpenVino
from raygkd.deploy.facts import facts_of
from raygkd.deploy.model import files_of, load_model, packed, unpacked
from raygkd.deploy.modules import student
from raygkd.errors import DataError
from raygkd.metrics.output_comparison import Agreement, Comparison
from raygkd.models import ModelFile
from raygkd.storage.atomic_files import place


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def noise(count: int, side: int) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5))


def outputs(model_file: ModelFile, images_BCSS: Tensor) -> Tensor:
    with torch.no_grad():
        return student(model_file)(images_BCSS)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelFile, Path]:
    """A classifier, and the graph that was written of it."""
    model_file = classifier_file(side=32)
    path = tmp_path_factory.mktemp("openvino") / "model.xml"
    OpenVino().write(model_file, path)
    return model_file, path


def test_classifier(exported: tuple[ModelFile, Path]) -> None:
    model_file, path = exported
    # as others run it
    compiled = openvino.Core().compile_model(path, "CPU")
    [taken], [given] = compiled.inputs, compiled.outputs
    assert (taken.any_name, str(taken.partial_shape)) == ("images", "[?,3,32,32]")
    assert (given.any_name, str(given.partial_shape)) == ("logits", "[?,3]")
    facts, run = load_model(place(path))
    assert facts == facts_of(model_file)
    assert facts.class_names == CLASSES
    for count in (1, 5):
        torch.testing.assert_close(
            run(noise(count, 32)), outputs(model_file, noise(count, 32)), atol=1e-4, rtol=0
        )
    # nothing of the machine that wrote it
    assert str(Path.cwd()) not in path.read_text()
    assert "site-packages" not in path.read_text()


def test_both_files_go_to_other_machines(exported: tuple[ModelFile, Path], tmp_path: Path) -> None:
    model_file, path = exported
    assert [one.name for one in files_of(path)] == ["model.xml", "model.bin"]
    _, run = load_model(unpacked(packed(path), tmp_path))
    torch.testing.assert_close(run(noise(2, 32)), outputs(model_file, noise(2, 32)))


@pytest.mark.parametrize("family", ["fasterrcnn", "ssdlite"])
def test_detector(family: str, tmp_path: Path) -> None:
    model_file, comparison = detector_file(family), Comparison()
    run = OpenVino().write(model_file, tmp_path / "model.xml")
    for count in (1, 3):
        images = noise(count, 64)
        comparison.add(outputs(model_file, images), run(images), 64)
    assert comparison.detections > 100
    assert comparison.is_equal, comparison


def test_int8(exported: tuple[ModelFile, Path], tmp_path: Path) -> None:
    (model_file, full), small = exported, tmp_path / "small.xml"
    int8 = OpenVino().calibrate(model_file, full, [noise(32, 32)], tmp_path)
    run = int8.write(small)
    assert small.with_suffix(".bin").stat().st_size < 0.3 * full.with_suffix(".bin").stat().st_size
    agreement = Agreement()
    agreement.add(outputs(model_file, noise(64, 32)), run(noise(64, 32)))
    assert agreement.share is not None
    assert agreement.share > 0.8
    assert load_model(place(small))[0] == facts_of(model_file)
    # it multiplies in 8 bits
    compiled = openvino.Core().compile_model(small, "CPU")
    layers = [one.rt_info for one in compiled.get_runtime_model().get_ops()]
    kinds = [
        one["runtimePrecision"].astype(str)
        for one in layers
        if one["layerType"].astype(str) == "Convolution"
    ]
    assert kinds == ["u8"] * 9
    errors = int8.errors([noise(4, 32)])
    assert errors.keys() == set(int8.layers)
    left = int8.write(small, int8.layers)
    torch.testing.assert_close(left(noise(2, 32)), outputs(model_file, noise(2, 32)))


def test_files_that_do_not_belong_together(
    exported: tuple[ModelFile, Path], tmp_path: Path
) -> None:
    _, source = exported
    graph, weights = tmp_path / "model.xml", tmp_path / "model.bin"
    graph.write_bytes(source.read_bytes())
    with pytest.raises(DataError, match=r"^cannot read .*/model\.bin: No such file or directory$"):
        load_model(place(graph))
    weights.write_bytes(source.with_suffix(".bin").read_bytes()[:-4])
    with pytest.raises(DataError, match=r"does not belong to model\.bin$"):
        load_model(place(graph))
    graph.write_text("<nothing/>")
    with pytest.raises(DataError, match=r"model\.xml is damaged or not an OpenVINO model"):
        load_model(place(graph))


def test_model_of_others(exported: tuple[ModelFile, Path], tmp_path: Path) -> None:
    _, source = exported
    model = openvino.Core().read_model(source)
    del model.rt_info["raygkd"]
    openvino.save_model(model, tmp_path / "other.xml")
    with pytest.raises(DataError, match="was not written by 'raygkd export'"):
        load_model(place(tmp_path / "other.xml"))
