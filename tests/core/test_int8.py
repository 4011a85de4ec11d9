"""Eight bits with fixed ranges: which nodes they reach, and what they change."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from lively import classifier_file
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from raygkd.deploy.exporters.int8_graph import layer_names, nodes_in_8_bits, prepare
from raygkd.deploy.exporters.onnx import write_onnx
from raygkd.deploy.exporters.static_int8 import StaticInt8
from raygkd.deploy.facts import Facts, facts_of
from raygkd.deploy.model import load_model
from raygkd.deploy.modules import Run
from raygkd.errors import ConfigError
from raygkd.metrics.output_comparison import Agreement
from raygkd.storage.atomic_files import place


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def noise(count: int, side: int, seed: int = 5) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def operators(path: Path) -> Counter[str]:
    """Return how often onnxruntime runs each operator of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimised"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path.with_suffix(".optimised")).graph.node)


def graph_file(path: Path, nodes: list[Any], weights: dict[str, tuple[int, ...]]) -> Path:
    """Write a graph from "images" (batch, 3, 8, 8) to "y", with random weights."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=size).astype(np.float32) for name, size in weights.items()}
    ports = [
        helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 8]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "graph", ports[:1], ports[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    facts = Facts(
        model="graph", task="classification", class_names=("a",), image_size=8, resize="stretch"
    )
    helper.set_model_props(model, facts.to_metadata())
    onnx.save(model, path)
    return path


def quantised(source: Path, folder: Path) -> tuple[StaticInt8, Run]:
    model = StaticInt8(source, [noise(16, 8, seed) for seed in range(2)], folder)
    return model, model.write(folder / "small.onnx")


def test_static_int8(tmp_path: Path) -> None:
    model_file, full = classifier_file("resnet8"), tmp_path / "full.onnx"
    run = write_onnx(model_file, full)
    batches = [noise(16, 12, seed) for seed in range(4)]
    model = StaticInt8(full, batches, tmp_path)
    small = model.write(tmp_path / "small.onnx")
    # all but the normalisation of the pixels, in the kernels that are fast
    assert operators(tmp_path / "small.onnx") == {
        **{"Sub": 1, "Div": 1, "QuantizeLinear": 1, "Transpose": 2, "QLinearConv": 9},
        **{"QLinearAdd": 3, "QLinearGlobalAveragePool": 1, "Flatten": 1, "QGemm": 1},
    }
    assert (tmp_path / "small.onnx").stat().st_size < 0.4 * full.stat().st_size
    images = noise(64, 12)
    agreement = Agreement()
    agreement.add(run(images), small(images))
    assert agreement.share is not None
    assert agreement.share > 0.9
    assert load_model(place(tmp_path / "small.onnx"))[0] == facts_of(model_file)
    assert {"stem.0", "stage2.0.shortcut.0", "classifier"} < set(model.layers)
    # with every layer in float it is the float model
    assert torch.equal(model.write(tmp_path / "small.onnx", model.layers)(images), run(images))


def test_error_of_a_layer_is_its_own(tmp_path: Path) -> None:
    """Layers behind the two bad ones get exact inputs."""
    model_file, full = classifier_file("resnet8"), tmp_path / "full.onnx"
    # a channel between them that is read by none, with a range that leaves the others no steps
    model_file.state_dict["stage2.0.residual.1.weight"][0] = 0.0
    model_file.state_dict["stage2.0.residual.1.bias"][0] = 1e3
    model_file.state_dict["stage2.0.residual.3.weight"][:, 0] = 0.0
    write_onnx(model_file, full)
    batches = [noise(16, 12, seed) for seed in range(2)]
    errors = StaticInt8(full, batches, tmp_path).errors(batches)
    bad = {"stage2.0.residual.0", "stage2.0.residual.3"}
    assert all((errors[layer] > 0.2) == (layer in bad) for layer in errors), errors
    assert min(errors.values()) > 0


def test_hard_swish_is_a_table_and_a_product(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["images", "w1"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("HardSwish", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["y"]),
    ]
    full = graph_file(tmp_path / "full.onnx", nodes, {"w1": (4, 3, 3, 3), "w2": (4, 4, 1, 1)})
    _, small = quantised(full, tmp_path)
    found = operators(tmp_path / "small.onnx")
    assert (found["QLinearLeakyRelu"], found["QLinearMul"], found["HardSigmoid"]) == (1, 1, 0)
    assert found["DequantizeLinear"] == 1
    images = noise(8, 8)
    wanted = onnxruntime.InferenceSession(full).run(None, {"images": images.numpy()})[0]
    # within a few of the 255 steps
    assert np.abs(small(images).numpy() - wanted).max() < 0.03 * np.ptp(wanted)


def test_products_of_matrices_leave_what_follows_in_float(tmp_path: Path) -> None:
    """As in a transformer; and two variable factors, as in attention, stay in float too."""
    nodes = [
        helper.make_node("MatMul", ["images", "w"], ["a"]),
        helper.make_node("Add", ["a", "model.fc.bias"], ["b"]),
        helper.make_node("MatMul", ["b", "a"], ["y"]),
    ]
    full = graph_file(tmp_path / "full.onnx", nodes, {"w": (8, 8), "model.fc.bias": (8,)})
    prepare(full, tmp_path / "prepared.onnx")
    graph = onnx.load(tmp_path / "prepared.onnx").graph
    assert nodes_in_8_bits(graph, ()) == ["0_MatMul"]
    assert layer_names(graph) == {"0_MatMul": "fc"}
    quantised(full, tmp_path)
    found = operators(tmp_path / "small.onnx")
    assert (found["MatMulIntegerToFloat"], found["MatMul"]) == (1, 1)


def test_float_layer_takes_its_neighbours_with_it(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["images", "model.one.weight"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "model.two.weight"], ["c"]),
        helper.make_node("Add", ["b", "c"], ["y"]),
    ]
    weights = {"model.one.weight": (4, 3, 1, 1), "model.two.weight": (4, 4, 1, 1)}
    full = graph_file(tmp_path / "full.onnx", nodes, weights)
    prepare(full, tmp_path / "prepared.onnx")
    graph = onnx.load(tmp_path / "prepared.onnx").graph
    assert nodes_in_8_bits(graph, ()) == ["0_Conv", "1_Relu", "2_Conv", "3_Add"]
    assert nodes_in_8_bits(graph, {"two"}) == ["0_Conv", "1_Relu"]
    assert nodes_in_8_bits(graph, {"one"}) == ["2_Conv"]


def test_model_without_layers(tmp_path: Path) -> None:
    full = graph_file(tmp_path / "full.onnx", [helper.make_node("Relu", ["images"], ["y"])], {})
    with pytest.raises(ConfigError, match="no Conv, Gemm, MatMul with fixed weights; omit it"):
        StaticInt8(full, [noise(2, 8)], tmp_path)
