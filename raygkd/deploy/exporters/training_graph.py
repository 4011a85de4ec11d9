"""The graph with which a classifier is trained in 8 bits, and the way back to its own weights.

Shapes: B batch, C channels, H height, W width, S side of the square input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from raygkd.deploy.exporters.int8_graph import LAYERS
from raygkd.deploy.exporters.onnx import write_onnx
from raygkd.deploy.exporters.static_int8 import StaticInt8
from raygkd.deploy.exporters.tracing import IMAGES, LOGITS
from raygkd.deploy.modules import DeployedClassifier
from raygkd.errors import ConfigError
from raygkd.models import FeatureTap, ModelFile, build_from_file, short_name
from raygkd.models.fake_quantised import (
    DEQUANTISE,
    OPERATORS,
    QUANTISE,
    QUANTISE_WEIGHT,
    Node,
    QuantisedGraph,
    run_node,
)
from raygkd.models.levels import all_levels

# images that are compared, and the largest difference between equal tensors, as a share of their
# largest value
COMPARED, TOLERANCE = 2, 1e-3
EXPORT_INSTEAD = "export it with 'raygkd export --quantize int8' instead"
# of the model in ``DeployedClassifier``
_MODEL = "model."


def training_graph(
    model_file: ModelFile, batches: Iterable[Tensor], folder: Path
) -> QuantisedGraph:
    """Return the graph of a classifier as ``StaticInt8`` quantises it, with weights in float.

    Args:
        model_file: of the classifier.
        batches: calibration images (B, 3, S, S) in 0..1.
        folder: for temporary files.

    Raises:
        ConfigError: the model has operators or layers that cannot be trained in 8 bits.
    """
    import onnx

    source = folder / "float.onnx"
    write_onnx(model_file, source)
    static = StaticInt8(source, batches, folder)
    name = short_name(model_file.name)
    full, small = onnx.load(static.prepared).graph, static.with_float_weights().graph
    constants = _constants(full)
    trained = _trained(full)
    full_nodes = [_node(node) for node in full.node]
    _check_operators(full_nodes, name)
    nodes = _quantised_nodes(small, set(trained))
    read = {name for node in nodes for name in node.inputs}
    graph = QuantisedGraph(
        nodes=nodes,
        source=IMAGES,
        result=LOGITS,
        constants={name: one for name, one in _constants(small).items() if name in read},
        trained=trained,
        levels=_levels(model_file, full_nodes, constants, small),
        ranges=static.ranges,
    )
    _check_way_back(model_file, graph)
    return graph


def own_weights(
    model_file: ModelFile, graph: QuantisedGraph, trained: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the state dict of a classifier with the weights of its graph.

    Batch normalisation that the exporter has folded becomes the addition of a bias.

    Args:
        model_file: that the graph was made of.
        graph: of ``training_graph``.
        trained: ``FakeQuantised.trained``.

    Raises:
        ConfigError: the model has no parameters for some weights.
    """
    model = build_from_file(model_file)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    norms = {
        layer: norm
        for layer, norm in _norms(model_file, model).items()
        if f"{_MODEL}{norm}.weight" not in graph.constants
    }
    for name, value in trained.items():
        own = name.removeprefix(_MODEL)
        layer = own.rpartition(".")[0]
        if own.endswith(".weight"):
            _set(state, own, value, name)
            continue
        if layer in norms:
            norm = norms[layer]
            eps: Any = model.get_submodule(norm).eps
            _set(state, f"{norm}.weight", torch.ones_like(value), name)
            _set(state, f"{norm}.running_mean", torch.zeros_like(value), name)
            # with eps it is 1
            _set(state, f"{norm}.running_var", torch.full_like(value, 1 - eps), name)
            if f"{layer}.bias" in state:
                state[f"{layer}.bias"].zero_()
            layer = norm
        _set(state, f"{layer}.bias", value, name)
    return state


def _set(state: dict[str, Tensor], own: str, value: Tensor, name: str) -> None:
    if own not in state or state[own].shape != value.shape:
        raise ConfigError(
            f"--quantize int8: the weights {name} of the exported graph are not parameters of "
            f"the model; {EXPORT_INSTEAD}"
        )
    state[own] = value.clone()


def _norms(model_file: ModelFile, model: nn.Module) -> dict[str, str]:
    """Return layer -> batch normalisation that reads its output, by their paths."""
    outputs: dict[int, tuple[str, Tensor]] = {}
    found: dict[str, str] = {}

    def note(path: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            outputs[id(output)] = path, output
        elif isinstance(module, _BatchNorm) and id(inputs[0]) in outputs:
            found[outputs[id(inputs[0])][0]] = path

    handles = [
        module.register_forward_hook(
            lambda module, inputs, output, path=path: note(path, module, inputs, output)
        )
        for path, module in model.named_modules()
    ]
    with torch.no_grad():
        model(torch.zeros(1, 3, *model_file.image_size))
    for handle in handles:
        handle.remove()
    return found


def _constants(graph: Any) -> dict[str, Tensor]:
    from onnx import numpy_helper

    return {
        one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer
    }


def _trained(graph: Any) -> tuple[str, ...]:
    """Return the weights and biases of the layers of a graph."""
    constants = {one.name for one in graph.initializer}
    layers = [node for node in graph.node if node.op_type in LAYERS]
    names = [name for node in layers for name in node.input[1:] if name in constants]
    return tuple(dict.fromkeys(names))


def _node(node: Any) -> Node:
    from onnx import helper

    settings = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    return Node(
        operator=node.op_type,
        inputs=tuple(node.input),
        outputs=tuple(node.output),
        # texts are only those of paddings that the exporter has computed
        settings={name: one for name, one in settings.items() if not isinstance(one, bytes)},
    )


def _check_operators(nodes: Iterable[Node], name: str) -> None:
    if unknown := sorted({node.operator for node in nodes} - OPERATORS.keys()):
        raise ConfigError(
            f"--quantize int8: {name} has operators that cannot be trained in 8 bits, because they "
            f"are not those of a convolutional network: {', '.join(unknown)}; {EXPORT_INSTEAD}"
        )


def _quantised_nodes(graph: Any, trained: set[str]) -> tuple[Node, ...]:
    """Return the nodes of a graph with fake quantisers in the place of the quantising ones."""
    constants = _constants(graph)
    # tensor in 8 bits -> its scale and zero point
    stored: dict[str, tuple[float, int]] = {}
    found = []
    for one in graph.node:
        node = _node(one)
        if node.operator == QUANTISE and node.inputs[0] in trained:
            axis = node.settings["axis"]
            node = Node(
                operator=QUANTISE_WEIGHT,
                inputs=node.inputs[:1],
                outputs=node.outputs,
                settings={"axis": axis},
            )
        elif node.operator == QUANTISE:
            scale, zero = (constants[name].item() for name in node.inputs[1:])
            zero = int(zero)
            stored[node.outputs[0]] = scale, zero
            node = Node(
                operator=QUANTISE,
                inputs=node.inputs[:1],
                outputs=node.outputs,
                settings={"scale": scale, "zero_point": zero},
            )
        elif node.operator == DEQUANTISE:
            settings = {}
            # weights are read as they were stored
            if (before := stored.get(node.inputs[0])) is not None:
                scale, zero = (constants[name].item() for name in node.inputs[1:])
                if before != (scale, zero):
                    offset = (before[1] - zero) * scale
                    settings = {"factor": scale / before[0], "offset": offset}
            node = Node(
                operator=DEQUANTISE,
                inputs=node.inputs[:1],
                outputs=node.outputs,
                settings=settings,
            )
        found.append(node)
    return tuple(found)


def _levels(
    model_file: ModelFile, nodes: Iterable[Node], constants: Mapping[str, Tensor], small: Any
) -> dict[int, str]:
    """Return level -> tensor of the quantised graph with its feature map.

    It is the tensor that has the map's values in the float graph.

    Raises:
        ConfigError: there is none.
    """
    model = DeployedClassifier(model_file)
    known = all_levels(model.model, model_file.image_size)
    images_BCSS = _noise(model_file)
    with torch.no_grad(), FeatureTap(model.model, list(known)) as tap:
        _, maps = tap(model.normalised(images_BCSS))
        values: dict[str, Any] = {IMAGES: images_BCSS, "": None}
        for name, value in constants.items():
            values[name] = value.tolist() if value.dtype == torch.int64 else value
        for node in nodes:
            values |= dict(zip(node.outputs, run_node(node, values), strict=False))
    read = {name: node.outputs[0] for name, node in _readers_in_8_bits(small).items()}
    found = {}
    for level, map_BCHW in maps.items():
        same = [name for name, value in values.items() if _is_same(value, map_BCHW)]
        if not same:
            raise ConfigError(
                f"--quantize int8: the exported graph of {short_name(model_file.name)} has no "
                f"feature map of level {level} ({known[level].path}); {EXPORT_INSTEAD}"
            )
        found[level] = read.get(same[-1], same[-1])
    return found


def _readers_in_8_bits(graph: Any) -> dict[str, Node]:
    """Return tensor -> the node that reads it as it is stored in 8 bits."""
    nodes = [_node(one) for one in graph.node]
    stored = {node.outputs[0]: node.inputs[0] for node in nodes if node.operator == QUANTISE}
    return {stored[node.inputs[0]]: node for node in nodes if node.operator == DEQUANTISE}


def _is_same(value: Any, wanted: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.shape != wanted.shape:
        return False
    return float((value - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())


def _noise(model_file: ModelFile) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(COMPARED, 3, *model_file.image_size, generator=generator)


def _check_way_back(model_file: ModelFile, graph: QuantisedGraph) -> None:
    """Refuse a model that is another one with the weights of its own graph."""
    images_BCHW = _noise(model_file)
    model = build_from_file(model_file)
    with torch.no_grad():
        wanted = model(images_BCHW)
        model.load_state_dict(own_weights(model_file, graph, graph.initial))
        found = model(images_BCHW)
    if not _is_same(found, wanted):
        raise ConfigError(
            f"--quantize int8: {short_name(model_file.name)} shares weights between layers, or "
            f"changes them, so that it cannot be trained in 8 bits; {EXPORT_INSTEAD}"
        )
