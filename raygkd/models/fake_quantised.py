"""A classifier in 8 bits while it is trained: its ONNX graph in torch, with fake quantisers.

A fake quantiser rounds a tensor to the 256 values that 8 bits can hold, and keeps it in float.
Rounding has the gradient of the identity, and values out of range have none (arXiv 1712.05877).

Shapes: B batch, C channels, H height, W width, K classes; other tensors have any shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# of signed weights, which are symmetric, and of unsigned activations
WEIGHT_TOP, ACTIVATION_TOP = 127, 255
Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Node:
    """An operator of an ONNX graph.

    Attributes:
        operator: its ONNX name.
        inputs: names of tensors; "" for one that is left out.
        outputs: names of tensors.
        settings: its attributes.
    """

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantisedGraph:
    """A classifier with QuantizeLinear and DequantizeLinear nodes, and weights in float.

    Attributes:
        nodes: in the order in which they run.
        source: name of the images (B, 3, H, W) in 0..1.
        result: name of the logits (B, K).
        constants: name -> tensor.
        trained: names of the constants that are trained.
        levels: level -> name of its feature map (B, C, H, W).
        ranges: tensor of the float graph -> its smallest and its largest value.
    """

    nodes: tuple[Node, ...]
    source: str
    result: str
    constants: Mapping[str, Tensor]
    trained: tuple[str, ...]
    levels: Mapping[int, str]
    ranges: Mapping[str, tuple[float, float]]

    @property
    def initial(self) -> dict[str, Tensor]:
        """The trained constants before they are trained."""
        return {name: self.constants[name] for name in self.trained}

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values and tensors, the inverse of ``from_mapping``."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> QuantisedGraph:
        """Return the graph of ``to_mapping``."""
        nodes = tuple(Node(**node) for node in values["nodes"])
        return cls(**{**values, "nodes": nodes})


class FakeQuantised(nn.Module):
    """The classifier of a graph: images (B, 3, H, W) in 0..1 to logits (B, K).

    Ranges of activations are fixed; those of weights follow the weights, as the exporter takes
    them. Its levels are submodules that pass on their feature maps.

    Args:
        graph: the classifier; its tensors are copied.
    """

    def __init__(self, graph: QuantisedGraph):
        super().__init__()
        self._graph = graph
        self._steps = list(zip(graph.nodes, _last_uses(graph), strict=True))
        # parameters and buffers cannot have dots in their names
        self.weights = nn.ParameterDict(
            {_key(name): nn.Parameter(graph.constants[name].clone()) for name in graph.trained}
        )
        self._lists: dict[str, list[int]] = {}
        self._buffer_names: list[str] = []
        for name, value in graph.constants.items():
            if name in graph.trained:
                continue
            if value.dtype == torch.int64:
                self._lists[name] = value.tolist()
                continue
            self.register_buffer(_key(name), value.clone(), persistent=False)
            self._buffer_names.append(name)
        self.family_levels = {level: f"level{level}" for level in graph.levels}
        for path in self.family_levels.values():
            self.add_module(path, nn.Identity())

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return class scores (B, K)."""
        levels = {name: f"level{level}" for level, name in self._graph.levels.items()}
        values: Values = {self._graph.source: images_BCHW, "": None, **self._lists}
        values |= {name: self.weights[_key(name)] for name in self._graph.trained}
        values |= {name: getattr(self, _key(name)) for name in self._buffer_names}
        for node, unused in self._steps:
            for name, value in zip(node.outputs, run_node(node, values), strict=False):
                is_level = name in levels
                values[name] = self.get_submodule(levels[name])(value) if is_level else value
            for name in unused:
                del values[name]
        return values[self._graph.result]

    def trained(self) -> dict[str, Tensor]:
        """Return the trained constants of the graph."""
        return {name: self.weights[_key(name)].detach() for name in self._graph.trained}


def _key(name: str) -> str:
    return name.replace(".", "/")


def _last_uses(graph: QuantisedGraph) -> list[list[str]]:
    """Return for each node the tensors that no later node reads."""
    seen = {*graph.constants, graph.source, graph.result, ""}
    found = []
    for node in reversed(graph.nodes):
        names = dict.fromkeys((*node.inputs, *node.outputs))
        found.append([name for name in names if name not in seen])
        seen.update(names)
    return found[::-1]


def run_node(node: Node, values: Mapping[str, Any]) -> Sequence[Tensor]:
    """Return the outputs of a node.

    Args:
        node: whose operator is in ``OPERATORS``.
        values: name -> tensor, of all inputs; a list of integers for a constant of those.
    """
    output = OPERATORS[node.operator](*(values[name] for name in node.inputs), **node.settings)
    return [output] if isinstance(output, Tensor) else output


def fake_quantise(values: Tensor, *, scale: float, zero_point: int) -> Tensor:
    """Return activations rounded to 8 bits: (q - zero_point) scale for a q in 0..255."""
    return torch.fake_quantize_per_tensor_affine(values, scale, zero_point, 0, ACTIVATION_TOP)


def fake_quantise_weight(weight: Tensor, *, axis: int) -> Tensor:
    """Return weights rounded to 8 bits; the largest of each channel becomes 127 or -127.

    Args:
        weight: of a convolution or a matrix product.
        axis: of its output channels.
    """
    others = [dim for dim in range(weight.ndim) if dim != axis % weight.ndim]
    scale_C = weight.detach().abs().amax(others) / WEIGHT_TOP
    # as the exporter has it for a channel of zeros
    scale_C = scale_C.where(scale_C >= torch.finfo(torch.float32).tiny, torch.ones_like(scale_C))
    zeros_C = torch.zeros_like(scale_C, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(
        weight, scale_C, zeros_C, axis % weight.ndim, -WEIGHT_TOP, WEIGHT_TOP
    )


def _dequantise(values: Tensor, *, factor: float = 1.0, offset: float = 0.0) -> Tensor:
    return values if factor == 1.0 and offset == 0.0 else values * factor + offset


def _conv(
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    strides: Sequence[int] = (1, 1),
    pads: Sequence[int] = (0, 0, 0, 0),
    dilations: Sequence[int] = (1, 1),
    group: int = 1,
    **_: Any,
) -> Tensor:
    x_BCHW, padding = _padded(x_BCHW, pads, 0.0)
    return F.conv2d(x_BCHW, weight, bias, tuple(strides), padding, tuple(dilations), group)


def _padded(x_BCHW: Tensor, pads: Sequence[int], value: float) -> tuple[Tensor, tuple[int, int]]:
    """Return a map and the padding that is left to its operator, which is the same on both sides.

    Args:
        x_BCHW: the map.
        pads: at the top, left, bottom and right.
        value: of the padding.
    """
    top, left, bottom, right = pads
    if (top, left) == (bottom, right):
        return x_BCHW, (top, left)
    return F.pad(x_BCHW, (left, right, top, bottom), value=value), (0, 0)


def _max_pool(
    x_BCHW: Tensor,
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] = (1, 1),
    pads: Sequence[int] = (0, 0, 0, 0),
    dilations: Sequence[int] = (1, 1),
    ceil_mode: int = 0,
    **_: Any,
) -> Tensor:
    x_BCHW, padding = _padded(x_BCHW, pads, -torch.inf)
    return F.max_pool2d(
        x_BCHW, tuple(kernel_shape), tuple(strides), padding, tuple(dilations), bool(ceil_mode)
    )


def _average_pool(
    x_BCHW: Tensor,
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] = (1, 1),
    pads: Sequence[int] = (0, 0, 0, 0),
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    **_: Any,
) -> Tensor:
    return F.avg_pool2d(
        x_BCHW,
        tuple(kernel_shape),
        tuple(strides),
        tuple(pads[:2]),
        bool(ceil_mode),
        bool(count_include_pad),
    )


def _gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    product = alpha * ((a.T if transA else a) @ (b.T if transB else b))
    return product if c is None else product + beta * c


def _reshape(x: Tensor, shape: Sequence[int], *, allowzero: int = 0) -> Tensor:
    kept = [x.shape[dim] if size == 0 and not allowzero else size for dim, size in enumerate(shape)]
    return x.reshape(kept)


def _split(
    x: Tensor, sizes: list[int] | None = None, *, axis: int = 0, num_outputs: int = 1
) -> Sequence[Tensor]:
    return x.split(sizes or -(-x.shape[axis] // num_outputs), axis)


def _batch_norm(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, **settings: Any
) -> Tensor:
    return F.batch_norm(x, mean, var, scale, bias, eps=settings.get("epsilon", 1e-5))


def _unsqueeze(x: Tensor, axes: Iterable[int]) -> Tensor:
    for axis in sorted(axes):
        x = x.unsqueeze(axis)
    return x


# what is stored as integers in the exported file are rounded floats here, so that DequantizeLinear
# has nothing to do, unless it reads with another scale than QuantizeLinear stored with
QUANTISE, QUANTISE_WEIGHT, DEQUANTISE = "QuantizeLinear", "QuantizeWeight", "DequantizeLinear"
# operator -> function of its inputs and settings
OPERATORS: dict[str, Callable[..., Any]] = {
    QUANTISE: fake_quantise,
    QUANTISE_WEIGHT: fake_quantise_weight,
    DEQUANTISE: _dequantise,
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": torch.matmul,
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": torch.div,
    "Relu": F.relu,
    "Clip": torch.clamp,
    "LeakyRelu": lambda x, *, alpha=0.01: F.leaky_relu(x, alpha),
    "Sigmoid": torch.sigmoid,
    "HardSigmoid": lambda x, *, alpha=0.2, beta=0.5: (alpha * x + beta).clamp(0, 1),
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Split": _split,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda x_BCHW: x_BCHW.mean((2, 3), keepdim=True),
    "BatchNormalization": _batch_norm,
    "Reshape": _reshape,
    "Flatten": lambda x, *, axis=1: x.flatten(axis),
    "Squeeze": lambda x, axes: x.squeeze(tuple(axes)),
    "Unsqueeze": _unsqueeze,
    "Transpose": lambda x, *, perm: x.permute(perm),
}
