"""Metrics of channel graphs against networkx, and their loss against loops over its formula.

Shape letters: B batch, C channels, H height, W width, G graphs.
"""

from __future__ import annotations

import math

import networkx
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from raygkd.config import registered_settings
from raygkd.errors import ConfigError
from raygkd.graph import adjacency
from raygkd.graph.vertex_metrics import METRICS, vertex_metrics
from raygkd.losses import baseline_loss, graph_metrics
from raygkd.losses.batch_graph import correlations
from raygkd.losses.graph_metrics import batch_covariance, metrics_loss

SHAPES = {"student_shapes": {1: (4, 4, 4)}, "teacher_shapes": {1: (6, 2, 2)}}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(similarities: Tensor) -> networkx.Graph:
    """Return the graph of channels with the weights and distances that its docstring gives."""
    graph = networkx.Graph()
    for i in range(len(similarities)):
        for j in range(i):
            weight = max((1 + similarities[i, j].item()) / 2, 1e-3)
            square = similarities[i, i] + similarities[j, j] - 2 * similarities[i, j]
            graph.add_edge(i, j, weight=weight, distance=max(math.sqrt(max(square, 0.0)), 1e-3))
    return graph


def oracle(similarities: Tensor) -> dict[str, list[float]]:
    graph, count = network(similarities), len(similarities)
    found = {
        "degree": {v: total / (count - 1) for v, total in graph.degree(weight="weight")},
        "clustering": networkx.clustering(graph, weight="weight"),
        "pagerank": {v: count * share for v, share in networkx.pagerank(graph, tol=1e-14).items()},
        "eigenvector": {
            v: math.sqrt(count) * entry
            for v, entry in networkx.eigenvector_centrality_numpy(graph, weight="weight").items()
        },
        "closeness": networkx.closeness_centrality(graph, distance="distance"),
    }
    return {name: [values[v] for v in range(count)] for name, values in found.items()}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("channels", [3, 9])
def test_metrics_are_those_of_networkx(name: str, channels: int):
    graphs = adjacency(random(2, channels, 2, 3))
    values = vertex_metrics(graphs, [name])
    expected = torch.tensor([[oracle(graph)[name]] for graph in graphs], dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", METRICS)
def test_opposite_and_like_channels_keep_an_edge_and_a_distance(name: str):
    maps = random(1, 5, 2, 3)
    maps[:, 1], maps[:, 2] = -maps[:, 0], maps[:, 0]
    graph = adjacency(maps)
    expected = torch.tensor([[oracle(graph[0])[name]]], dtype=torch.float64)
    torch.testing.assert_close(vertex_metrics(graph, [name]), expected, rtol=1e-8, atol=1e-10)


def test_metrics_of_correlations_are_those_of_networkx():
    graph = correlations(batch_covariance(random(4, 7, 3, 3)))
    values = vertex_metrics(graph[None], METRICS)
    expected = torch.tensor([[*oracle(graph).values()]], dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", METRICS)
def test_gradients_are_those_of_the_values(name: str):
    maps = random(2, 5, 2, 2).requires_grad_()
    assert gradcheck(lambda maps: vertex_metrics(adjacency(maps), [name]), maps)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("kind", ["alike", "opposite", "dead", "zero"])
def test_degenerate_graphs_have_finite_gradients(name: str, kind: str):
    maps = random(1, 5, 2, 2).float()
    if kind == "alike":
        maps[:] = maps[:, :1]
    elif kind == "opposite":
        maps[:] = maps[:, :1] * torch.tensor([1.0, -1, 1, -1, 1])[:, None, None]
    else:
        maps[:, : 2 if kind == "dead" else 5] = 0
    maps.requires_grad_()
    values = vertex_metrics(adjacency(maps), [name])
    values.square().sum().backward()
    assert values.isfinite().all()
    assert maps.grad is not None
    assert maps.grad.isfinite().all()
    assert maps.grad.abs().max() < 1e4


def test_order_of_channels_orders_the_metrics():
    graph, order = adjacency(random(1, 6, 2, 3)), [3, 1, 5, 0, 2, 4]
    values = vertex_metrics(graph, METRICS)
    moved = vertex_metrics(graph[:, order][:, :, order], METRICS)
    torch.testing.assert_close(moved, values[..., order])


def test_a_graph_with_a_nan_has_no_metrics_and_others_keep_theirs():
    graphs = adjacency(random(2, 5, 2, 2))
    values = vertex_metrics(graphs, METRICS)
    graphs[0, 1, 2] = math.nan
    with_nan = vertex_metrics(graphs, METRICS)
    assert with_nan[0].isnan().all()
    torch.testing.assert_close(with_nan[1], values[1])


def naive_loss(student: Tensor, teacher: Tensor) -> float:
    """Return the loss of graphs (C, C) by networkx."""
    total = []
    for name, targets in oracle(teacher).items():
        mean = sum(targets) / len(targets)
        variance = sum((value - mean) ** 2 for value in targets) / len(targets)
        for value, target in zip(oracle(student)[name], targets, strict=True):
            total.append((value - target) ** 2 / (variance + (0.01 * mean) ** 2))
    return sum(total) / len(total)


def test_the_loss_follows_its_formula():
    student, teacher = adjacency(random(2, 6, 2, 2)), adjacency(random(2, 6, 2, 2, seed=1))
    expected = [naive_loss(*pair) for pair in zip(student, teacher, strict=True)]
    value = metrics_loss(student, teacher, METRICS)
    assert value.item() == pytest.approx(sum(expected) / 2, rel=1e-7)


def adapted(method: torch.nn.Module, student: Tensor) -> Tensor:
    """Return maps (B, 6, 2, 2) by loops: pooled, and mixed by the convolution."""
    pooled = student.unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean((3, 5))
    weight = method.adapters["1"].conv.weight[:, :, 0, 0]
    rows = [sum(w * pooled[:, c] for c, w in enumerate(row)) for row in weight]
    return torch.stack(rows, 1).detach()


def test_the_image_form_is_the_mean_over_the_images_and_the_same_in_parts(
    monkeypatch: pytest.MonkeyPatch,
):
    method = baseline_loss("graph-metrics", graphs="image", **SHAPES).double()
    student, teacher = random(5, 4, 4, 4).requires_grad_(), random(5, 6, 2, 2, seed=1)
    given = {"student_features": {1: student}, "teacher_features": {1: teacher}}
    wanted = [student, *method.parameters()]
    whole = method(**given)
    gradients = torch.autograd.grad(whole, wanted)
    graphs = [adjacency(adapted(method, student)), adjacency(teacher)]
    expected = [naive_loss(*pair) for pair in zip(*graphs, strict=True)]
    assert whole.item() == pytest.approx(sum(expected) / 5, rel=1e-7)
    monkeypatch.setattr(graph_metrics, "PART_BYTES", 2 * 6 * 6 * 8)
    parts = method(**given)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, wanted), gradients)


def test_the_batch_form_has_one_graph_of_correlations():
    method = baseline_loss("graph-metrics", **SHAPES).double()
    student, teacher = random(5, 4, 4, 4), random(5, 6, 2, 2, seed=1)
    value = method(student_features={1: student}, teacher_features={1: teacher})
    graphs = [
        correlations(torch.cov(maps.transpose(0, 1).flatten(1), correction=0))
        for maps in (adapted(method, student), teacher)
    ]
    assert value.item() == pytest.approx(naive_loss(*graphs), rel=1e-7)
    order = [3, 0, 4, 1, 2]
    moved = method(student_features={1: student[order]}, teacher_features={1: teacher[order]})
    torch.testing.assert_close(moved, value)
    scaled = method(student_features={1: 9 * student}, teacher_features={1: teacher / 7})
    torch.testing.assert_close(scaled, value)


def test_memory_between_the_passes_holds_maps_and_no_graphs_of_images():
    kept: list[tuple[int, ...]] = []
    shapes = {"student_shapes": {1: (4, 2, 2)}, "teacher_shapes": {1: (64, 2, 2)}}
    method = baseline_loss("graph-metrics", graphs="image", **shapes)
    maps = torch.randn(64, 4, 2, 2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tuple(tensor.shape)), tensor)[1], lambda tensor: tensor
    ):
        method(student_features={1: maps}, teacher_features={1: torch.randn(64, 64, 2, 2)})
    assert max(map(math.prod, kept)) <= 64 * 64 * 4


def test_the_names_of_the_settings_are_those_of_the_metrics():
    _, leaf, _ = registered_settings()["graph-metrics.metrics"]
    assert leaf.default == leaf.metadata["choices"] == METRICS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ("degre",)}, r"^unknown graph metric 'degre'; did you mean 'degree'\?"),
        ({"metrics": ()}, r"^no graph metrics; choose at least one \(allowed: degree, "),
        ({"graphs": "epoch"}, r"^unknown graphs 'epoch' \(allowed: batch, image\)$"),
        ({"teacher_shapes": {1: (2, 2, 2)}}, r"^graph-metrics: level 1 of the teacher has 2 chan"),
        ({"student_shapes": None, "teacher_shapes": None}, "^graph-metrics needs student_shapes"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message) as raised:
        baseline_loss("graph-metrics", **(SHAPES | changes))
    assert "\n" not in str(raised.value)
