"""Exported models say what the model says, and hold nothing but it.

Shapes: B batch, K classes, N candidates of a class, D detections.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from lively import CLASSES, classifier_file, detector_file
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.ops import box_iou

from raygkd.config import Config, to_yaml
from raygkd.deploy.exporters.onnx import quantise, write_onnx
from raygkd.deploy.exporters.safetensors import write_safetensors
from raygkd.deploy.exporters.static_int8 import StaticInt8
from raygkd.deploy.exporters.torch_program import write_program
from raygkd.deploy.exporters.tracing import ExportableDetector
from raygkd.deploy.facts import facts_of
from raygkd.deploy.model import load_model
from raygkd.deploy.modules import DeployedDetector, student
from raygkd.errors import DataError
from raygkd.metrics.output_comparison import Agreement, Comparison
from raygkd.models import ModelFile, build_from_file, count_parameters, save_model_file
from raygkd.models.fixed_shapes import suppress
from raygkd.report.card import model_card
from raygkd.storage.atomic_files import place

FAMILIES = ("fasterrcnn", "retinanet", "fcos", "ssdlite")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def noise(count: int, side: int, seed: int = 5) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def outputs(model_file: ModelFile, images_BCSS: Tensor) -> Tensor:
    """Return what the model says in the process that trained it."""
    with torch.no_grad():
        return student(model_file)(images_BCSS)


# fixed shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_fixed_shapes_find_what_the_detector_finds(family: str) -> None:
    model_file = detector_file(family)
    exportable = ExportableDetector(model_file).eval()
    images = noise(3, 64)
    comparison = Comparison()
    with torch.no_grad():
        comparison.add(DeployedDetector(model_file).eval()(images), exportable(images), 64)
        comparison.add(outputs(model_file, images[:1]), exportable(images[:1]), 64)
    assert comparison.detections > 100
    assert comparison.is_equal, comparison
    assert count_parameters(exportable) == count_parameters(build_from_file(model_file))


def test_fixed_shapes_of_nothing_found() -> None:
    model_file = detector_file("fcos")
    for name, tensor in model_file.state_dict.items():
        if name.endswith("cls_logits.bias"):
            tensor.fill_(-20.0)
    with torch.no_grad():
        found = ExportableDetector(model_file).eval()(noise(2, 64))
    assert found.shape == (2, 100, 6)
    assert torch.equal(found, torch.full_like(found, -1.0))


def naive_suppress(boxes_N4: Tensor, scores_N: Tensor, overlap: float, threshold: float) -> Tensor:
    kept = torch.zeros(len(scores_N), dtype=torch.bool)
    for number in scores_N.argsort(descending=True).tolist():
        if scores_N[number] > threshold:
            rivals = boxes_N4[kept]
            kept[number] = not (box_iou(boxes_N4[number, None], rivals) > overlap).any()
    return kept


def test_suppression_is_that_of_each_image_and_class() -> None:
    generator = torch.Generator().manual_seed(2)
    corners = 40 * torch.rand(2, 3, 30, 2, generator=generator)
    boxes = torch.cat([corners, corners + 5 + 20 * torch.rand(2, 3, 30, 2, generator=generator)], 3)
    scores = torch.rand(2, 3, 30, generator=generator)
    kept = suppress(boxes, scores, 0.4, 0.2)
    for image in range(2):
        for label in range(3):
            one = boxes[image, label], scores[image, label]
            assert torch.equal(kept[image, label], naive_suppress(*one, 0.4, 0.2))
    assert 10 < kept.sum() < scores.numel() - 40
    assert not suppress(boxes, scores, 0.4, 1.0).any()


# ONNX


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelFile, Path]:
    """A classifier, and the ONNX file that was written of it."""
    model_file, path = classifier_file("resnet20"), tmp_path_factory.mktemp("onnx") / "model.onnx"
    write_onnx(model_file, path)
    return model_file, path


def test_onnx_classifier(exported: tuple[ModelFile, Path]) -> None:
    model_file, path = exported
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [taken], [given] = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type, taken.shape) == (
        "images",
        "tensor(float)",
        ["batch", 3, 12, 12],
    )
    assert (given.name, given.shape) == ("logits", ["batch", 3])
    for count in (1, 2, 5):
        images = noise(count, 12)
        [logits] = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(logits, outputs(model_file, images), atol=1e-4, rtol=0)
    program = onnx.load(path)
    assert [(one.domain, one.version) for one in program.opset_import] == [("", 18)]
    facts = json.loads({one.key: one.value for one in program.metadata_props}["raygkd"])
    assert facts["class_names"] == list(CLASSES)
    assert (facts["image_size"], facts["task"]) == (12, "classification")
    # nothing of the machine that wrote it
    assert str(Path.cwd()).encode() not in path.read_bytes()
    assert b"site-packages" not in path.read_bytes()


def test_onnx_holds_the_student_alone(exported: tuple[ModelFile, Path]) -> None:
    """Batch normalisation is part of the convolutions; the normalisation has six numbers."""
    model_file, path = exported
    model = build_from_file(model_file)
    norms = [one for one in model.modules() if isinstance(one, nn.BatchNorm2d)]
    weights = onnx.load(path).graph.initializer
    floats = [one for one in weights if one.data_type == onnx.TensorProto.FLOAT]
    count = sum(math.prod(one.dims) for one in floats)
    assert count == count_parameters(model) - sum(one.num_features for one in norms) + 6


def test_onnx_detector(tmp_path: Path) -> None:
    model_file = detector_file("fasterrcnn", backbone="resnet18")
    path = tmp_path / "model.onnx"
    write_onnx(model_file, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    comparison = Comparison()
    for count in (1, 3):
        images = noise(count, 64)
        [found] = session.run(None, {"images": images.numpy()})
        comparison.add(outputs(model_file, images), torch.from_numpy(found), 64)
    assert comparison.detections > 100
    assert comparison.is_equal, comparison
    small = StaticInt8(path, [noise(4, 64)], tmp_path)
    assert {"net.backbone.body.conv1", "net.roi_heads.box_head.fc7"} <= set(small.layers)
    detections = small.write(tmp_path / "small.onnx")(noise(3, 64))
    assert detections.shape == (3, 100, 6)
    assert (detections[..., 4] > 0.05).any()


def test_dynamic_int8(exported: tuple[ModelFile, Path], tmp_path: Path) -> None:
    (model_file, full), small = exported, tmp_path / "small.onnx"
    run = quantise(full, small)
    assert small.stat().st_size < 0.4 * full.stat().st_size
    images = noise(64, 12)
    agreement = Agreement()
    agreement.add(outputs(model_file, images), run(images))
    assert agreement.share is not None
    assert agreement.share > 0.8
    assert load_model(place(small))[0] == facts_of(model_file)


# torch and safetensors


def test_torch_program(tmp_path: Path) -> None:
    model_file = classifier_file()
    path = tmp_path / "model.pt2"
    write_program(model_file, path)
    facts = {"raygkd": ""}
    program = torch.export.load(path, extra_files=facts)
    assert json.loads(facts["raygkd"])["class_names"] == list(CLASSES)
    assert sum(one.numel() for one in program.parameters()) == count_parameters(
        build_from_file(model_file)
    )
    for count in (1, 5):
        images = noise(count, 12)
        wanted = outputs(model_file, images)
        torch.testing.assert_close(program.module()(images), wanted, atol=1e-4, rtol=0)


def test_torch_program_of_a_detector(tmp_path: Path) -> None:
    model_file = detector_file("ssdlite")
    run = write_program(model_file, tmp_path / "model.pt2")
    comparison = Comparison()
    for count in (1, 3):
        images = noise(count, 64)
        comparison.add(outputs(model_file, images), run(images), 64)
    assert comparison.detections > 100
    assert comparison.is_equal, comparison


def test_safetensors_and_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_file = classifier_file()
    run = write_safetensors(model_file, tmp_path / "model.safetensors")
    images = noise(4, 12)
    assert torch.equal(run(images), outputs(model_file, images))
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == model_file.state_dict.keys()
    card = model_card(
        model_file,
        facts_of(model_file),
        parameters=78_000,
        file="model.safetensors",
        licence="apache-2.0",
        test_scores={"teacher": 0.9},
    )
    _, front, body = card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["license"] == "apache-2.0"
    assert (facts["student"], facts["scores"]) == ("resnet8", {"test, teacher": 0.9})
    # the code of the card does what it says
    code = re.findall(r"```python\n(.*?)```", body, re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    known: dict = {}
    exec(code, known)
    for name, tensor in known["model"].state_dict().items():
        assert torch.equal(tensor, model_file.state_dict[name])


def test_a_card_says_a_thing_once() -> None:
    scores = {"val_score": 0.5, "val_accuracy": 0.5, "val_top5": 1.0, "val_macro-f1": 1.0}
    # the loss is not the log-loss here
    scores |= {"val_loss": 2.5, "val_log-loss": 2.25}
    model_file = dataclasses.replace(classifier_file(), scores=scores, config=to_yaml(Config()))
    card = model_card(
        model_file, facts_of(model_file), parameters=1, file="x", licence="mit", test_scores={}
    )
    body = card.split("---\n", 2)[2]
    assert re.findall(r"^\| (val_\S+) \|", body, re.MULTILINE) == [
        *("val_accuracy", "val_top5", "val_macro-f1", "val_loss", "val_log-loss"),
    ]
    settings = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", body, re.DOTALL)[0])
    assert list(settings) == ["data", "model", "method", "optim", "recipe"]
    assert None not in [value for part in settings.values() for value in part.values()]


# files that are none


@pytest.mark.parametrize("name", ["model.onnx", "model.pt"])
def test_foreign_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(DataError, match="No such file"):
        load_model(place(path))
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"model\.(onnx|pt) is damaged,? or not? "):
        load_model(place(path))


def test_onnx_of_others(tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "other", ports[:1], ports[1:])
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    with pytest.raises(DataError, match="was not written by 'raygkd export'"):
        load_model(place(path))


# comparison


def detections(*rows: tuple[float, ...]) -> Tensor:
    packed = torch.full((1, 100, 6), -1.0)
    for place_, row in zip(packed[0], rows):
        place_[:] = torch.tensor(row)
    return packed


CAT, DOG = (4.0, 4.0, 20.0, 20.0, 0.9, 0.0), (30.0, 30.0, 50.0, 60.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("other", "largest", "alone"),
    [
        ((DOG, CAT), 0.0, 0),
        (((4.0, 4.0, 20.0, 20.64, 0.9, 0.0), DOG), 0.01, 0),
        ((CAT, (*DOG[:4], 0.49, 1.0)), 0.01, 0),
        ((CAT, (*DOG[:5], 2.0)), 0.0, 2),
        ((CAT,), 0.0, 1),
        ((CAT, DOG, DOG), 0.0, 1),
        ((CAT, DOG, (*DOG[:4], 0.05001, 2.0)), 0.0, 0),
    ],
)
def test_comparison_of_detections(
    other: tuple[tuple[float, ...], ...], largest: float, alone: int
) -> None:
    comparison = Comparison()
    comparison.add(detections(CAT, DOG), detections(*other), 64)
    assert comparison.largest == pytest.approx(largest, abs=1e-6)
    assert comparison.alone == alone
    assert comparison.is_equal == (largest == alone == 0)


def test_comparison_of_logits() -> None:
    comparison = Comparison()
    comparison.add(torch.zeros(2, 3), torch.full((2, 3), 9e-5), None)
    assert comparison.is_equal
    comparison.add(torch.zeros(2, 3), torch.full((2, 3), 2e-4), None)
    assert not comparison.is_equal
    broken = Comparison()
    broken.add(torch.zeros(1, 3), torch.full((1, 3), float("nan")), None)
    assert not broken.is_equal


def test_agreement() -> None:
    agreement = Agreement()
    agreement.add(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]])
    assert agreement.share == 0.5
    shifted = (6.0, 4.0, 22.0, 20.0, 0.4, 0.0)
    faint = (30.0, 30.0, 50.0, 60.0, 0.2, 1.0)
    agreement = Agreement()
    agreement.add(detections(CAT, DOG), detections(shifted, faint))
    assert agreement.share == pytest.approx(1 / 1.5)
    assert Agreement().share is None


# logged models


def test_models_that_mlflow_has_find_their_loader(tmp_path: Path) -> None:
    """Their ``loader_module`` is stored, and stays ``raygkd.deployed``."""
    file = detector_file("fasterrcnn")
    save_model_file(tmp_path / "model.pt", file)
    images = noise(2, file.image_size[0])
    loaded = importlib.import_module("raygkd.deployed")._load_pyfunc(str(tmp_path / "model.pt"))
    assert np.array_equal(loaded.predict(images.numpy()), outputs(file, images).numpy())
