"""Training in 8 bits: fake quantisers by hand, and the same numbers as ONNX Runtime."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from lively import classifier_file
from onnx import helper
from small_runs import SPEC, curve, make_training, random_stream, random_teacher, same, weights
from torch import Tensor, nn

from raygkd.deploy.exporters.onnx import write_onnx
from raygkd.deploy.exporters.static_int8 import StaticInt8
from raygkd.deploy.exporters.training_graph import own_weights, training_graph
from raygkd.deploy.modules import student
from raygkd.deploy.onnx_session import open_session
from raygkd.engine import read_checkpoint, restore, run_epoch, save_checkpoint
from raygkd.errors import ConfigError
from raygkd.models import ModelFile, load_model_file, save_model_file
from raygkd.models.classifiers import CLASSIFIERS
from raygkd.models.fake_quantised import (
    DEQUANTISE,
    FakeQuantised,
    QuantisedGraph,
    fake_quantise,
    fake_quantise_weight,
    run_node,
)
from raygkd.models.files import read_tensors
from raygkd.models.staged import StagedClassifier

SIDE = 12


class Excited(nn.Module):
    """Squeeze-excite, and a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=2, dilation=2, groups=channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return a map of the same shape."""
        squeezed = torch.relu(self.reduce(x_BCHW.mean((2, 3), keepdim=True)))
        gate = nn.functional.hardsigmoid(self.expand(squeezed))
        return x_BCHW + self.depthwise(x_BCHW * gate)


def excited(num_classes: int) -> StagedClassifier:
    """Return a classifier with the operators of MobileNetV3 and others between convolutions."""
    first = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardswish(), nn.MaxPool2d(2)
    )
    second = nn.Sequential(Excited(8), nn.ReLU6(), nn.AvgPool2d(2), nn.Sigmoid())
    return StagedClassifier(nn.Identity(), [first, second], 8, num_classes)


def normed(num_classes: int) -> StagedClassifier:
    """Return a classifier with layer normalisation."""
    stage = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LayerNorm([10, 10]), nn.GELU())
    return StagedClassifier(nn.Identity(), [stage], 8, num_classes)


CLASSIFIERS.register("excited")(excited)
CLASSIFIERS.register("normed")(normed)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def noise(count: int, side: int = SIDE, seed: int = 5) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def graph_of(model_file: ModelFile, folder: Path) -> QuantisedGraph:
    side = model_file.image_size[0]
    return training_graph(model_file, [noise(16, side, seed) for seed in range(2)], folder)


def test_fake_quantiser_by_hand() -> None:
    # q = round(x / 0.5) + 2 in 0..255, so that what is left are halves from -1 to 126.5
    x = torch.tensor([-3.0, -1.0, 0.2, 0.3, 126.5, 200.0], requires_grad=True)
    y = fake_quantise(x, scale=0.5, zero_point=2)
    assert y.tolist() == [-1.0, -1.0, 0.0, 0.5, 126.5, 126.5]
    (y * torch.arange(1.0, 7.0)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 0.0]


def test_fake_quantiser_of_weights_by_hand() -> None:
    # the channels' largest are 127 steps of 1 and of 0.5; one has no weights
    rows = [[127.0, 0.4, -1.6], [0.2, -63.5, 0.3], [0.0, 0.0, 0.0]]
    weight = torch.tensor(rows, requires_grad=True)
    rounded = fake_quantise_weight(weight, axis=0)
    assert rounded.tolist() == [[127.0, 0.0, -2.0], [0.0, -63.5, 0.5], [0.0, 0.0, 0.0]]
    rounded.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones(3, 3))
    assert torch.equal(fake_quantise_weight(weight.T, axis=1), rounded.T)


@pytest.mark.parametrize("name", ["resnet8", "excited"])
def test_onnxruntime_gives_the_same_within_a_step(name: str, tmp_path: Path) -> None:
    model_file = classifier_file(name, SIDE)
    graph = graph_of(model_file, tmp_path)
    module = FakeQuantised(graph).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            # as training would do
            parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter))
    state = own_weights(model_file, graph, module.trained())
    trained = dataclasses.replace(model_file, state_dict=state, ranges=dict(graph.ranges))
    save_model_file(tmp_path / "model.pt", trained)
    trained = load_model_file(tmp_path / "model.pt")
    write_onnx(trained, tmp_path / "full.onnx")
    static = StaticInt8(tmp_path / "full.onnx", (), tmp_path, trained.ranges)
    run = static.write(tmp_path / "small.onnx")
    images = noise(32)
    assert _largest_difference(graph, module, tmp_path / "small.onnx", images) <= 1.01
    with torch.no_grad():
        logits = module(images)
    assert (logits - run(images)).abs().max() < 0.02 * (logits.max() - logits.min())
    # and it is in 8 bits
    assert not torch.allclose(logits, student(trained)(images), atol=1e-4)


def _largest_difference(
    graph: QuantisedGraph, module: FakeQuantised, small: Path, images: Tensor
) -> float:
    """Return the largest difference of a tensor in 8 bits, in its steps.

    Every operator gets what onnxruntime gives to it, so that no difference of another one counts.
    """
    model = onnx.load(small)
    reads = {
        node.output[0]: node.input[1]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and not node.output[0].startswith("model.")
    }
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, 1, None) for name in reads)
    onnx.save(model, small.with_suffix(".all"))
    session = open_session(small.with_suffix(".all"), threads=1)
    found = dict(zip(reads, map(torch.from_numpy, session.run(None, {"images": images.numpy()}))))
    constants = {
        name: torch.tensor(onnx.numpy_helper.to_array(one))
        for name, one in ((one.name, one) for one in model.graph.initializer)
    }
    values: dict[str, Any] = {graph.source: images, "": None}
    for name, value in (graph.constants | module.trained()).items():
        values[name] = value.tolist() if value.dtype == torch.int64 else value
    largest, compared = 0.0, 0
    for node in graph.nodes:
        with torch.no_grad():
            values |= dict(zip(node.outputs, run_node(node, values), strict=False))
        [name, *_] = node.outputs
        if node.operator == DEQUANTISE and name in found:
            difference = (values[name] - found[name]).abs().max() / constants[reads[name]]
            largest, compared = max(largest, float(difference)), compared + 1
            values[name] = found[name]
    assert compared == len(found) > 10
    return largest


@pytest.mark.parametrize("name", ["resnet8", "excited"])
def test_weights_of_the_graph_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    model_file = classifier_file(name, SIDE)
    graph = graph_of(model_file, tmp_path)
    state = own_weights(model_file, graph, graph.initial)
    same_model = student(dataclasses.replace(model_file, state_dict=state))
    images = noise(8)
    assert torch.allclose(same_model(images), student(model_file)(images), atol=1e-5)
    if name == "resnet8":
        assert sorted(graph.levels) == [1, 2, 3]
        assert state["stem.1.running_mean"].abs().max() == 0


def test_graph_is_read_as_it_was_written(tmp_path: Path) -> None:
    graph = graph_of(classifier_file("excited", SIDE), tmp_path)
    torch.save(graph.to_mapping(), tmp_path / "graph.pt")
    again = QuantisedGraph.from_mapping(read_tensors(tmp_path / "graph.pt"))
    images = noise(4)
    with torch.no_grad():
        assert torch.equal(FakeQuantised(graph)(images), FakeQuantised(again)(images))


def test_unknown_operators_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="a convolutional network: Erf, LayerNormalization; export"
    ):
        graph_of(classifier_file("normed", SIDE), tmp_path)


def test_resumed_training_equals_one_without_a_break(tmp_path: Path) -> None:
    start = dataclasses.replace(random_teacher(seed=1), mean=SPEC.mean, std=SPEC.std)
    graph = graph_of(start, tmp_path)

    def training(**settings: Any) -> Any:
        return make_training(random_stream(), graph=graph, ema=0.9, epochs=3, **settings)

    whole = training()
    expected = curve(whole)
    begun = training()
    run_epoch(begun)
    save_checkpoint(tmp_path / "checkpoint.pt", begun)
    resumed = training()
    restore(resumed, read_checkpoint(tmp_path / "checkpoint.pt"))
    assert curve(resumed) == expected[1:]
    assert same(weights(resumed.objective), weights(whole.objective))
    assert not same(weights(whole.model), FakeQuantised(graph).state_dict())
    # an average of integers would fall by one in each step
    buffers = dict(whole.model.named_buffers())
    assert {name for name, one in buffers.items() if not one.is_floating_point()} == set()
    for name, parameter in whole.objective.student.named_parameters():
        assert parameter.grad is not None, name
