"""Which nodes of an ONNX graph run in 8 bits, and how they are rewritten for that.

onnxruntime fuses a node with the QuantizeLinear and DequantizeLinear nodes around it only if it has
an 8-bit kernel for its operator; any other node between them costs time instead of saving it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# operators with weights
LAYERS = ("Conv", "Gemm", "MatMul")
# operators that stay in 8 bits between convolutions. Others, and these between matrix products (as
# in a transformer), are faster in float, where onnxruntime fuses them
BETWEEN = (
    *("Add", "Mul", "Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "Concat"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "Resize"),
    *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"),
)
# largest 8-bit number
_TOP = 255


def prepare(source: Path, path: Path) -> None:
    """Write a graph with folded batch normalisation, a kernel for each mean, and unique names.

    Args:
        source: an ONNX file.
        path: the file to write.
    """
    import onnx
    from onnxruntime.quantization import quant_pre_process

    # onnx's own inference of shapes is enough for the types, which the quantiser needs
    quant_pre_process(str(source), str(path), skip_symbolic_shape=True)
    model = onnx.load(path)
    _pool_means(model.graph)
    used = {name for node in model.graph.node for name in node.input}
    kept = [one for one in model.graph.initializer if one.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for number, node in enumerate(model.graph.node):
        node.name = f"{number}_{node.op_type}"
    onnx.save(model, path)


def _pool_means(graph: Any) -> None:
    """Replace means over height and width, which have no 8-bit kernel, by global pooling."""
    from onnx import helper, numpy_helper

    constants = {one.name: one for one in graph.initializer}
    maps = {one.name for one in graph.value_info if len(one.type.tensor_type.shape.dim) == 4}
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type != "ReduceMean" or node.input[0] not in maps or len(node.input) < 2:
            continue
        if node.input[1] not in constants:
            continue
        axes = numpy_helper.to_array(constants[node.input[1]])
        if sorted(axis % 4 for axis in axes.tolist()) != [2, 3]:
            continue
        keeps = all(one.i for one in node.attribute if one.name == "keepdims")
        [given], [wanted] = node.input[:1], node.output
        pooled = wanted if keeps else f"{wanted}_pooled"
        nodes[-1] = helper.make_node("GlobalAveragePool", [given], [pooled])
        if not keeps:
            shape = helper.make_tensor_value_info(pooled, 1, [None, None, 1, 1])
            graph.value_info.append(shape)
            nodes.append(helper.make_node("Flatten", [pooled], [wanted]))
    # make_node copies, and the old ones belong to the graph
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def layer_names(graph: Any) -> dict[str, str]:
    """Return node -> name, for each convolution and matrix product with constant weights.

    The name is that of the module in torch, as far as the exporter has kept it, with a number for
    each further use of its weights.
    """
    constants = {one.name for one in graph.initializer}
    readers = _readers(graph)
    found: dict[str, str] = {}
    uses: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type not in LAYERS or node.input[1] not in constants:
            continue
        # the exporter transposes weights of matrix products under new names, but not their biases
        adds = [one for one in readers[node.output[0]] if one.op_type == "Add"]
        added = [name for one in adds for name in one.input]
        parameters = [name for name in (*node.input[1:], *added) if name in constants]
        modules = [name.rpartition(".")[0] for name in parameters if name.startswith("model.")]
        name = modules[0].removeprefix("model.") if modules else node.name
        uses[name] += 1
        found[node.name] = name if uses[name] == 1 else f"{name} ({uses[name]})"
    return found


def nodes_in_8_bits(graph: Any, float_layers: Collection[str]) -> list[str]:
    """Return the names of the nodes to quantise.

    They are the layers, and the nodes whose inputs all come from quantised convolutions, directly
    or through such nodes.

    Args:
        graph: as ``prepare`` wrote it.
        float_layers: names of layers that stay in float, as in ``layer_names``.
    """
    constants = {one.name for one in graph.initializer}
    layers = layer_names(graph)
    chosen: list[str] = []
    in_8_bits: set[str] = set()
    for node in graph.node:
        inputs = [name for name in node.input if name and name not in constants]
        is_layer = node.name in layers and layers[node.name] not in float_layers
        is_between = node.op_type in BETWEEN and inputs and in_8_bits.issuperset(inputs)
        if is_layer or is_between:
            chosen.append(node.name)
        if is_between or (is_layer and node.op_type == "Conv"):
            in_8_bits.update(node.output)
    return chosen


def look_up_hard_sigmoids(graph: Any) -> None:
    """Replace each quantised hard sigmoid by a table look-up with the same values.

    There is no 8-bit hard sigmoid, but to quantise clips: stored as round(255 (a x + b)) in 0..255
    and read as that number / 255, x becomes clip(a x + b, 0, 1). LeakyRelu with a slope of 1, which
    leaves values as they are, is what onnxruntime runs as a table of 256 bytes.
    """
    from onnx import helper, numpy_helper

    readers = _readers(graph)
    for node in graph.node:
        follow = readers[node.output[0]]
        is_quantised = [one.op_type for one in follow] == ["QuantizeLinear"]
        if node.op_type != "HardSigmoid" or not is_quantised:
            continue
        given = {"alpha": 0.2, "beta": 0.5} | {one.name: one.f for one in node.attribute}
        zero = round(_TOP * given["beta"])
        if given["alpha"] <= 0 or not 0 <= zero <= _TOP:
            continue
        constants = {
            "stored_scale": np.float32(1 / (_TOP * given["alpha"])),
            "stored_zero": np.uint8(zero),
            "read_scale": np.float32(1 / _TOP),
            "read_zero": np.uint8(0),
        }
        for name, value in constants.items():
            graph.initializer.append(
                numpy_helper.from_array(np.array(value), f"{node.name}_{name}")
            )
        node.op_type = "LeakyRelu"
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("alpha", 1.0))
        [stored] = follow
        stored.input[1:] = [f"{node.name}_stored_scale", f"{node.name}_stored_zero"]
        for read in readers[stored.output[0]]:
            read.input[1:] = [f"{node.name}_read_scale", f"{node.name}_read_zero"]


def _readers(graph: Any) -> dict[str, list[Any]]:
    """Return tensor -> the nodes that read it."""
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    return readers


def with_layer_errors(full: Any, quantised: Any, layers: Iterable[str]) -> Any:
    """Return a float model whose outputs are the errors of its layers, each quantised on its own.

    For each layer there are two outputs, both with a value for each channel of the layer's output:
    the sum of the squared differences that quantisation makes, and the sum of squares. The
    quantised layer gets the float model's tensors, so that no error of another layer counts.

    Args:
        full: the model as ``prepare`` wrote it.
        quantised: the same with QuantizeLinear and DequantizeLinear nodes around its layers.
        layers: names of nodes.
    """
    result = type(full).FromString(full.SerializeToString())
    shapes = {one.name: one.type.tensor_type.shape.dim for one in full.graph.value_info}
    shapes |= {one.name: one.type.tensor_type.shape.dim for one in full.graph.output}
    copy = _LayerCopy(quantised.graph, {name: len(shape) for name, shape in shapes.items()})
    outputs: list[str] = []
    for name in layers:
        outputs += copy.add(name)
    known = {one.name for one in full.graph.initializer}
    result.graph.node.extend(copy.nodes)
    result.graph.initializer.extend(
        one for one in (*quantised.graph.initializer, *copy.axes) if one.name not in known
    )
    _replace_outputs(result.graph, outputs)
    return result


def _replace_outputs(graph: Any, names: Sequence[str]) -> None:
    from onnx import TensorProto, helper

    del graph.output[:]
    graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
    )


class _LayerCopy:
    """Copies quantised layers, each with the nodes around it, for use in the float graph."""

    def __init__(self, graph: Any, ranks: Mapping[str, int]):
        self.nodes: list[Any] = []
        self.axes: list[Any] = []
        self._by_name = {node.name: node for node in graph.node}
        self._source = {name: node for node in graph.node for name in node.output}
        self._readers = _readers(graph)
        self._ranks = ranks

    def add(self, name: str) -> list[str]:
        """Add the nodes of a layer; return its two outputs."""
        from onnx import helper, numpy_helper

        layer = self._by_name[name]
        inputs = [self._dequantised(one, name) for one in layer.input]
        self._copy(layer, inputs, name)
        output, wanted = f"{name}/{layer.output[0]}", layer.output[0]
        stores = [one for one in self._readers[wanted] if one.op_type == "QuantizeLinear"]
        if stores:
            self._copy(stores[0], [output, *stores[0].input[1:]], name)
            stored = stores[0].output[0]
            read = self._readers[stored][0]
            self._copy(read, [f"{name}/{stored}", *read.input[1:]], name)
            output = f"{name}/{read.output[0]}"
            if wanted not in self._ranks:  # the layer is the last one
                wanted = read.output[0]
        ends = [f"{name}/error", f"{name}/size"]
        rank = self._ranks[wanted]
        channels = 1 if layer.op_type == "Conv" else rank - 1
        axes = np.array([axis for axis in range(rank) if axis != channels], np.int64)
        self.axes.append(numpy_helper.from_array(axes, f"{name}/axes"))
        self.nodes.append(helper.make_node("Sub", [output, wanted], [f"{name}/difference"]))
        for tensor, end in zip((f"{name}/difference", wanted), ends, strict=True):
            given = [tensor, f"{name}/axes"]
            self.nodes.append(helper.make_node("ReduceSumSquare", given, [end], keepdims=0))
        return ends

    def _dequantised(self, tensor: str, prefix: str) -> str:
        """Copy the nodes that quantise an input of a layer; return the name of the result."""
        read = self._source.get(tensor)
        if read is None or read.op_type != "DequantizeLinear":
            return tensor
        stored = read.input[0]
        if (store := self._source.get(stored)) is not None:
            self._copy(store, list(store.input), prefix)
            stored = f"{prefix}/{stored}"
        self._copy(read, [stored, *read.input[1:]], prefix)
        return f"{prefix}/{tensor}"

    def _copy(self, node: Any, inputs: Sequence[str], prefix: str) -> None:
        copy = type(node).FromString(node.SerializeToString())
        copy.name = f"{prefix}/{node.name}"
        copy.input[:] = inputs
        copy.output[:] = [f"{prefix}/{name}" for name in node.output]
        self.nodes.append(copy)
