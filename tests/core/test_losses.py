"""The graph losses, logit distillation, and the module over several levels.

Shape letters: B batch, C channels, H height, W width, K columns of the factor,
d spectral dimension.
"""

import itertools
import json
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from raygkd.errors import ConfigError
from raygkd.graph import (
    ATTENTION_MODES,
    WEIGHTS,
    ChannelGraphs,
    adjacency,
    attention_masks,
    centred,
    deflated_factor,
    foreground_weights,
    relational_attention,
    spectral_embedding,
)
from raygkd.losses import (
    ADAPTERS,
    SPECTRAL_MODES,
    GraphDistillationLoss,
    edge_loss,
    kd_loss,
    procrustes_distance,
    residual_distance,
    spectral_loss,
    subspace_distance,
    vertex_loss,
)
from raygkd.losses.adapters import Adapter
from raygkd.losses.features import NormalisedConvolution

GOLDEN = Path(__file__).parents[1] / "golden"
Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss] = {"vertex": lambda student, teacher: vertex_loss(student, teacher, 0.5)}
for attention in ATTENTION_MODES:
    LOSSES[f"edge-{attention}"] = lambda student, teacher, attention=attention: edge_loss(
        student, teacher, 0.5, attention
    )
for mode in SPECTRAL_MODES:
    for weights in WEIGHTS:
        LOSSES[f"{mode}-{weights}"] = lambda student, teacher, mode=mode, weights=weights: (
            spectral_loss(student, teacher, 2, mode, weights)
        )

each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def positive_maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)) + 0.01


def pair_of_maps(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return positive_maps(*shape, dtype=dtype), positive_maps(*shape, seed=1, dtype=dtype)


# Values


def test_golden_values():
    expected = json.loads((GOLDEN / "losses.json").read_text())
    values = runpy.run_path(str(GOLDEN / "print_losses.py"))["golden_losses"]()
    assert values == pytest.approx(expected, rel=1e-9)


def test_vertex_loss_follows_its_formula():
    student, teacher = pair_of_maps(2, 5, 3, 4)
    spatial, channel = attention_masks(teacher, 0.5)
    per_sample = [
        (channel[b, :, None, None] * spatial[b] * (teacher[b] - student[b]) ** 2).mean()
        / (teacher[b] ** 2).mean()
        for b in range(2)
    ]
    torch.testing.assert_close(vertex_loss(student, teacher, 0.5), sum(per_sample) / 2)


@pytest.mark.parametrize("attention", ATTENTION_MODES)
def test_edge_loss_follows_its_formula(attention: str):
    student, teacher = pair_of_maps(2, 5, 3, 4)
    attention_BCC = relational_attention(teacher, 0.5, attention)
    expected = (attention_BCC * (adjacency(teacher) - adjacency(student)) ** 2).mean()
    torch.testing.assert_close(edge_loss(student, teacher, 0.5, attention), expected)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", [(2, 9, 2, 2), (2, 5, 3, 4)])
def test_spectral_losses_equal_their_dense_formulas(shape: tuple[int, ...], weights: str):
    student, teacher = pair_of_maps(*shape)
    factor = deflated_factor(student, weights)
    values_t, vectors_t = spectral_embedding(teacher, 3, weights)
    values_s, vectors_s = spectral_embedding(student, 3, weights)
    power_B = values_t.square().sum(1)

    residual = factor @ factor.mT @ vectors_t - vectors_t @ values_t.diag_embed()
    expected = (residual.square().sum((1, 2)) / power_B).mean()
    torch.testing.assert_close(spectral_loss(student, teacher, 3, "residual", weights), expected)

    kernel_t = vectors_t @ values_t.diag_embed() @ vectors_t.mT
    kernel_s = vectors_s @ values_s.diag_embed() @ vectors_s.mT
    expected = ((kernel_t - kernel_s).square().sum((1, 2)) / power_B).mean()
    torch.testing.assert_close(spectral_loss(student, teacher, 3, "subspace", weights), expected)

    embedded_t = vectors_t * values_t.sqrt()[:, None]
    embedded_s = vectors_s * values_s.sqrt()[:, None]
    shared_B = torch.linalg.matrix_norm(embedded_t.mT @ embedded_s, "nuc")
    power_B = embedded_t.square().sum((1, 2))
    squares_B = embedded_s.square().sum((1, 2)) + power_B
    expected = ((squares_B - 2 * shared_B) / power_B).mean()
    torch.testing.assert_close(spectral_loss(student, teacher, 3, "procrustes", weights), expected)


@each_loss
@each_dtype
def test_loss_of_a_map_with_itself_is_zero(loss: Loss, dtype: torch.dtype):
    for shape in [(2, 9, 2, 2), (2, 5, 3, 4), (2, 5, 1, 1)]:
        maps = positive_maps(*shape, dtype=dtype)
        assert 0 <= loss(maps, maps) < 1e-5


@each_loss
@each_dtype
def test_loss_is_the_same_after_one_permutation_of_both_sides(loss: Loss, dtype: torch.dtype):
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    for shape in [(2, 7, 2, 2), (2, 7, 3, 4)]:
        student, teacher = pair_of_maps(*shape, dtype=dtype)
        expected = loss(student, teacher)
        permuted = loss(student[:, order], teacher[:, order])
        torch.testing.assert_close(permuted, expected, rtol=1e-5, atol=1e-7)
        assert (loss(student[:, order], teacher) - expected).abs() > 1e-3 * expected


@each_loss
def test_two_half_batches_average_to_the_whole_batch(loss: Loss):
    student, teacher = pair_of_maps(4, 5, 3, 3)
    teacher = teacher * torch.tensor([0.1, 1.0, 2.0, 7.0])[:, None, None, None]
    student.requires_grad_()
    whole = loss(student, teacher)
    halves = (loss(student[:2], teacher[:2]) + loss(student[2:], teacher[2:])) / 2
    torch.testing.assert_close(halves, whole)
    (whole_gradient,) = torch.autograd.grad(whole, student)
    (halves_gradient,) = torch.autograd.grad(halves, student)
    torch.testing.assert_close(halves_gradient, whole_gradient)


# Invariance to the choice of eigenvectors


def orthonormal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.linalg.qr(positive_maps(*shape, seed=seed, dtype=dtype) - 0.5).Q


def turned(vectors_BCd: Tensor) -> Tensor:
    """Flip vectors 0 and 3, and rotate 1 and 2, which share an eigenvalue."""
    cos, sin = math.cos(0.7), math.sin(0.7)
    turn_dd = torch.block_diag(-torch.ones(1, 1), torch.tensor([[cos, -sin], [sin, cos]]))
    turn_dd = torch.block_diag(turn_dd, -torch.ones(1, 1))
    return vectors_BCd @ turn_dd.to(vectors_BCd.dtype)


@each_dtype
def test_distances_do_not_depend_on_signs_and_rotations_inside_an_eigenspace(dtype: torch.dtype):
    values_t = torch.tensor([[0.6, 0.3, 0.3, 0.1]], dtype=dtype)
    values_s = torch.tensor([[0.5, 0.4, 0.4, 0.2]], dtype=dtype)
    vectors_t, vectors_s = (orthonormal(1, 8, 4, seed=seed, dtype=dtype) for seed in (0, 1))
    close = {"rtol": 1e-5, "atol": 1e-5}
    for positions in (5, 9):
        graphs = ChannelGraphs(positive_maps(1, 8, positions, 1, dtype=dtype))
        torch.testing.assert_close(
            residual_distance(graphs.times(turned(vectors_t)), values_t, turned(vectors_t)),
            residual_distance(graphs.times(vectors_t), values_t, vectors_t),
            **close,
        )
    for distance in (subspace_distance, procrustes_distance):
        expected = distance(values_s, vectors_s, values_t, vectors_t)
        for student, teacher in [
            (turned(vectors_s), vectors_t),
            (vectors_s, turned(vectors_t)),
            (turned(vectors_s), turned(vectors_t)),
        ]:
            torch.testing.assert_close(
                distance(values_s, student, values_t, teacher), expected, **close
            )
        assert distance(values_t, turned(vectors_t), values_t, vectors_t).item() < 1e-6
        assert expected.item() > 1e-3


# Gradients


@each_dtype
def test_procrustes_gradient_is_finite_at_zero_eigenvalues_and_without_overlap(dtype: torch.dtype):
    vectors_BCd = torch.eye(6, dtype=dtype)[None]
    values_Bd = torch.tensor([[0.5, 0.5, 0.0]], dtype=dtype).requires_grad_()
    student_BCd = vectors_BCd[:, :, :3].clone().requires_grad_()
    procrustes_distance(values_Bd, student_BCd, values_Bd, vectors_BCd[:, :, 3:]).sum().backward()
    assert values_Bd.grad.isfinite().all()
    assert student_BCd.grad.isfinite().all()
    assert student_BCd.grad.abs().max() > 0


@each_loss
@pytest.mark.parametrize("shape", [(2, 6, 2, 2), (2, 4, 2, 3)])
def test_loss_passes_gradcheck(loss: Loss, shape: tuple[int, ...]):
    student, teacher = pair_of_maps(*shape)
    assert gradcheck(lambda maps: loss(maps, teacher), student.requires_grad_())


@pytest.mark.parametrize("name", [name for name in LOSSES if "procrustes" not in name])
@pytest.mark.parametrize("shape", [(2, 6, 2, 2), (2, 4, 2, 3)])
def test_loss_has_second_derivatives(name: str, shape: tuple[int, ...]):
    student, teacher = pair_of_maps(*shape)
    assert gradgradcheck(lambda maps: LOSSES[name](maps, teacher), student.requires_grad_())


@each_loss
@pytest.mark.parametrize("shape", [(2, 6, 2, 2), (2, 4, 2, 3)])
def test_loss_is_for_torch_func(loss: Loss, shape: tuple[int, ...]):
    """Its gradient as a function, and that of each sample at once."""
    student, teacher = pair_of_maps(*shape)
    leaf = student.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, teacher), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(student, teacher), expected)
    of_one = torch.func.grad(lambda one, other: loss(one[None], other[None]))
    of_each = torch.vmap(of_one)(student, teacher)
    torch.testing.assert_close(of_each / len(student), expected)


@each_loss
def test_teacher_gets_no_gradient(loss: Loss):
    student, teacher = pair_of_maps(2, 6, 2, 2)
    student.requires_grad_()
    teacher.requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0


def degenerate_maps(channels: int, height: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Return maps (2, C, H, W) whose graphs have repeated, zero or undefined quantities."""
    generic = positive_maps(2, channels, height, width, dtype=dtype)
    one, half = generic[:, :1], channels // 2
    complete = one.repeat(1, channels, 1, 1)
    antipodal = torch.cat([complete[:, :half], -complete[:, half:]], 1)
    orthogonal = torch.zeros_like(generic).flatten(2)
    orthogonal[:, :half, 0] = 1.0
    orthogonal[:, half:, -1] = 1.0
    duplicates = generic.clone()
    duplicates[:, 1] = duplicates[:, 0]
    dead = generic.clone()
    dead[:, 1] = 0.0
    constant = generic.mean((2, 3), keepdim=True).expand_as(generic).clone()
    cycle = torch.eye(channels, height * width, dtype=dtype).expand(2, -1, -1)
    return [
        generic,
        complete,
        antipodal,
        orthogonal.view_as(generic),
        duplicates,
        dead,
        constant,
        cycle.reshape(generic.shape),
        torch.zeros_like(generic),
    ]


@each_loss
@each_dtype
@pytest.mark.parametrize("shape", [(9, 2, 2), (4, 3, 3), (4, 1, 1)], ids=["C>N", "C<N", "N=1"])
def test_gradient_is_finite_on_degenerate_graphs(
    loss: Loss, dtype: torch.dtype, shape: tuple[int, int, int]
):
    candidates = degenerate_maps(*shape, dtype)
    for student in candidates:
        for teacher in candidates:
            student_BCHW = student.clone().requires_grad_()
            value = loss(student_BCHW, teacher)
            value.backward()
            assert value.isfinite()
            assert student_BCHW.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "vertex"])
def test_dead_channel_of_the_student_gets_no_gradient_from_graphs(name: str):
    student, teacher = pair_of_maps(2, 6, 2, 3, dtype=torch.float32)
    student[:, 1] = 0.0
    student.requires_grad_()
    LOSSES[name](student, teacher).backward()
    assert (student.grad[:, 1] == 0).all()
    assert student.grad[:, 0].abs().max() > 0
    assert student.grad.abs().max() < 10


@each_loss
def test_teacher_map_of_zeros_says_nothing_about_scale(loss: Loss):
    student, _ = pair_of_maps(2, 6, 2, 3, dtype=torch.float32)
    student.requires_grad_()
    loss(student, torch.zeros(2, 6, 2, 3)).backward()
    assert student.grad.abs().max() < 10


@each_loss
def test_nan_reaches_the_loss(loss: Loss):
    student, teacher = pair_of_maps(2, 6, 2, 3)
    student[0, 0] = float("nan")
    assert loss(student, teacher).isnan()
    assert loss(teacher, student).isnan()


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_under_autocast_equals_float32(loss: Loss, dtype: torch.dtype):
    student, teacher = (maps.to(dtype) for maps in pair_of_maps(2, 6, 3, 3))
    expected = loss(student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student.requires_grad_(), teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert student.grad.isfinite().all()


# Wrong inputs


@each_loss
def test_different_shapes_are_refused_with_both(loss: Loss):
    with pytest.raises(ConfigError, match=r"got \(2, 5, 3, 3\) and \(2, 6, 3, 3\)"):
        loss(positive_maps(2, 5, 3, 3), positive_maps(2, 6, 3, 3))


def test_unknown_mode_and_too_large_dimension_are_refused():
    student, teacher = pair_of_maps(1, 4, 2, 2)
    with pytest.raises(ConfigError, match=r"'residul'.*did you mean 'residual'"):
        spectral_loss(student, teacher, 2, "residul")
    with pytest.raises(ConfigError, match=r"from 1 to 3 .* got 4"):
        spectral_loss(student, teacher, 4)


# Foreground weighting


def some_boxes(*boxes: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(boxes).reshape(-1, 4)


def marked(boxes: Tensor, canvas: int, grid: tuple[int, int]) -> list[list[int]]:
    """Return which cells of one image are foreground, row by row."""
    (weights_HW,) = foreground_weights([boxes], canvas, grid, 1.0)
    return (weights_HW > 0).int().tolist()


@pytest.mark.parametrize(
    ("box", "cells"),
    [
        # four centres, at 24 and 40 pixels, are inside
        ((20.0, 20.0, 44.0, 44.0), [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]),
        # x to the right, y down; an edge on a centre counts at the begin alone
        ((8.0, 24.0, 24.0, 56.0), [[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]),
        # no centre is inside: across, down, or both
        ((26.0, 4.0, 30.0, 30.0), [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),
        ((4.0, 49.0, 30.0, 51.0), [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]),
        ((60.0, 1.0, 62.0, 3.0), [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),
        # on the far border of the canvas, without area
        ((64.0, 64.0, 64.0, 64.0), [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]),
    ],
)
def test_a_box_marks_the_cells_whose_centres_it_holds_and_at_least_one(
    box: tuple[float, float, float, float], cells: list[list[int]]
):
    assert marked(some_boxes(box), 64, (4, 4)) == cells


def test_every_box_however_small_marks_a_cell_of_every_grid():
    generator = torch.Generator().manual_seed(0)
    for cells in (1, 2, 5, 12):
        corner_M2 = torch.rand(50, 2, generator=generator) * 96
        size_M2 = torch.rand(50, 2, generator=generator) * 2
        for box in torch.cat([corner_M2, (corner_M2 + size_M2).clamp(max=96)], 1):
            assert sum(map(sum, marked(box[None], 96, (cells, cells)))) >= 1


def test_boxes_together_mark_what_each_of_them_marks():
    first, second = some_boxes((0, 0, 40, 20)), some_boxes((20, 10, 60, 60))
    both = torch.tensor(marked(torch.cat([first, second]), 64, (8, 4)))
    apart = torch.tensor(marked(first, 64, (8, 4))) | torch.tensor(marked(second, 64, (8, 4)))
    assert torch.equal(both, apart)
    assert both.shape == (8, 4)


def test_foreground_has_its_share_of_weights_that_average_to_one():
    few, many = some_boxes((0, 0, 16, 16)), some_boxes((0, 0, 64, 32), (0, 0, 32, 64))
    nothing, everything = some_boxes(), some_boxes((0, 0, 64, 64))
    weights = foreground_weights([few, many, nothing, everything], 64, (4, 4), 0.4)
    torch.testing.assert_close(weights.mean((1, 2)), torch.ones(4))
    assert weights[0, 0, 0].item() == pytest.approx(0.4 * 16)
    assert weights[0, 1:].unique().item() == pytest.approx(0.6 * 16 / 15)
    assert weights[1, 0, 0].item() == pytest.approx(0.4 * 16 / 12)
    assert weights[1, 3, 3].item() == pytest.approx(0.6 * 16 / 4)
    assert torch.equal(weights[2:], torch.ones(2, 4, 4))
    # also where one side has no weight
    for share in (0.0, 1.0):
        assert torch.equal(
            foreground_weights([nothing, everything], 64, (2, 2), share), weights.new_ones(2, 2, 2)
        )


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_outside_of_0_and_1_is_refused(share: float):
    with pytest.raises(ConfigError, match=rf"foreground share must be from 0 to 1; got {share}"):
        foreground_weights([some_boxes()], 64, (4, 4), share)


def test_weighted_vertex_loss_follows_its_formula():
    student, teacher = pair_of_maps(2, 5, 3, 4)
    weights = positive_maps(2, 3, 4, seed=2)
    spatial, channel = attention_masks(teacher, 0.5)
    per_sample = [
        (
            channel[b, :, None, None] * spatial[b] * weights[b] * (teacher[b] - student[b]) ** 2
        ).mean()
        / (teacher[b] ** 2).mean()
        for b in range(2)
    ]
    torch.testing.assert_close(vertex_loss(student, teacher, 0.5, weights), sum(per_sample) / 2)
    assert gradcheck(
        lambda maps: vertex_loss(maps, teacher, 0.5, weights), student.requires_grad_()
    )


BOXES = [some_boxes((0, 0, 30, 20), (40, 40, 43, 43)), some_boxes((10, 30, 60, 64))]


def foreground_loss(student: Tensor, teacher: Tensor, share: float, *boxes: Tensor) -> Tensor:
    height, width = student.shape[2:]
    weights = foreground_weights(boxes or BOXES, 64, (height, width), share)
    return vertex_loss(student, teacher, 0.5, weights)


def test_the_share_of_the_area_gives_the_plain_loss_and_no_other():
    student, teacher = pair_of_maps(1, 5, 8, 8)
    plain = vertex_loss(student, teacher, 0.5)
    area = torch.tensor(marked(BOXES[0], 64, (8, 8))).double().mean().item()
    torch.testing.assert_close(
        foreground_loss(student, teacher, area, BOXES[0]), plain, rtol=1e-6, atol=0
    )
    other = foreground_loss(student, teacher, area + 0.2, BOXES[0])
    assert (other - plain).abs() > 1e-3 * plain
    torch.testing.assert_close(foreground_loss(student, teacher, 0.5, some_boxes()), plain)


def test_a_share_of_one_looks_at_objects_only_and_of_zero_at_the_background_only():
    student, teacher = pair_of_maps(2, 5, 8, 8)
    outside = torch.tensor([marked(boxes, 64, (8, 8)) for boxes in BOXES])[:, None] == 0
    changed = student + outside * positive_maps(2, 5, 8, 8, seed=3)
    torch.testing.assert_close(
        foreground_loss(changed, teacher, 1.0), foreground_loss(student, teacher, 1.0)
    )
    changed = student + ~outside * positive_maps(2, 5, 8, 8, seed=3)
    torch.testing.assert_close(
        foreground_loss(changed, teacher, 0.0), foreground_loss(student, teacher, 0.0)
    )
    assert (foreground_loss(changed, teacher, 1.0) - foreground_loss(student, teacher, 1.0)) > 0.01


def test_weighted_loss_does_not_depend_on_order_of_channels_boxes_and_samples():
    student, teacher = pair_of_maps(2, 5, 8, 8)
    expected = foreground_loss(student, teacher, 0.7)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(foreground_loss(student[:, order], teacher[:, order], 0.7), expected)
    turned = [boxes.flip(0) for boxes in BOXES]
    torch.testing.assert_close(foreground_loss(student, teacher, 0.7, *turned), expected)
    flipped = foreground_loss(student.flip(0), teacher.flip(0), 0.7, *BOXES[::-1])
    torch.testing.assert_close(flipped, expected)
    alone = [
        foreground_loss(student[b : b + 1], teacher[b : b + 1], 0.7, BOXES[b]) for b in range(2)
    ]
    torch.testing.assert_close(sum(alone) / 2, expected)


# Logits


def test_kd_loss_is_the_scaled_divergence_of_softened_probabilities():
    student, teacher = positive_maps(3, 5), positive_maps(3, 5, seed=1)
    p_t, p_s = F.softmax(teacher / 4, 1), F.softmax(student / 4, 1)
    expected = 16 * (p_t * (p_t.log() - p_s.log())).sum(1).mean()
    torch.testing.assert_close(kd_loss(student, teacher, 4.0), expected)
    assert kd_loss(teacher, teacher, 4.0).abs() < 1e-12
    assert gradcheck(lambda logits: kd_loss(logits, teacher, 4.0), student.requires_grad_())


def test_kd_loss_is_float32_under_autocast_and_gives_the_teacher_no_gradient():
    student = positive_maps(3, 5, dtype=torch.float32).bfloat16().requires_grad_()
    teacher = positive_maps(3, 5, seed=1, dtype=torch.float32).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = kd_loss(student, teacher, 4.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, kd_loss(student.float(), teacher.float(), 4.0))
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


def test_kd_loss_refuses_other_classes_and_temperatures():
    with pytest.raises(ConfigError, match=r"logits .* got \(3, 5\) and \(3, 6\).*; temperature"):
        kd_loss(positive_maps(3, 5), positive_maps(3, 6), 0.0)


# The module over several levels

STUDENT_SHAPES = {1: (4, 6, 6), 3: (8, 2, 2)}
TEACHER_SHAPES = {1: (6, 3, 3), 3: (8, 4, 4)}


def make_module(**changes: Any) -> GraphDistillationLoss:
    torch.manual_seed(0)
    settings = {"temperature": 0.5, "dim": 3, "alpha": 1.0, "beta": 2.0, "gamma": 3.0} | changes
    student_shapes = settings.pop("student_shapes", STUDENT_SHAPES)
    teacher_shapes = settings.pop("teacher_shapes", TEACHER_SHAPES)
    return GraphDistillationLoss(student_shapes, teacher_shapes, **settings)


def level_features() -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    student = {k: positive_maps(2, *s, dtype=torch.float32) for k, s in STUDENT_SHAPES.items()}
    teacher = {
        k: positive_maps(2, *s, seed=1, dtype=torch.float32) for k, s in TEACHER_SHAPES.items()
    }
    return student, teacher


def test_module_averages_each_term_over_levels_on_the_coarser_grid():
    module = make_module(mode="subspace", attention="softmax", weights="cosine")
    student, teacher = level_features()
    shallow = module.adapters["1"](F.avg_pool2d(student[1], 2)), teacher[1]
    deep = module.adapters["3"](student[3]), F.avg_pool2d(teacher[3], 2)
    terms = module(student, teacher)
    expected = {
        "vertex": sum(vertex_loss(*maps, 0.5) for maps in (shallow, deep)) / 2,
        "edge": sum(edge_loss(*maps, 0.5, "softmax") for maps in (shallow, deep)) / 2,
        "spectral": sum(spectral_loss(*maps, 3, "subspace", "cosine") for maps in (shallow, deep))
        / 2,
    }
    assert terms.keys() == expected.keys() == module.term_weights.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)


def test_module_that_centres_compares_centred_maps_and_forgets_every_channels_mean():
    module, plain = make_module(centre=True), make_module()
    student, teacher = level_features()
    terms = module(student, teacher)
    deep = module.adapters["3"](student[3]), F.avg_pool2d(teacher[3], 2)
    shallow = module.adapters["1"](F.avg_pool2d(student[1], 2)), teacher[1]
    for name, loss in (("vertex", vertex_loss), ("edge", edge_loss)):
        pairs = ([centred(one) for one in maps] for maps in (shallow, deep))
        torch.testing.assert_close(terms[name], sum(loss(*maps, 0.5) for maps in pairs) / 2)
    shifted = {level: maps + 3.0 for level, maps in teacher.items()}
    for name, value in module(student, shifted).items():
        torch.testing.assert_close(value, terms[name], rtol=1e-4, atol=1e-6)
    assert (plain(student, shifted)["vertex"] - plain(student, teacher)["vertex"]).abs() > 0.01


def test_a_map_of_one_position_has_nothing_left_when_it_is_centred():
    shapes = {1: (4, 1, 1)}
    module = make_module(centre=True, student_shapes=shapes, teacher_shapes=shapes)
    maps = {1: positive_maps(2, 4, 1, 1, dtype=torch.float32)}
    assert {name: term.item() for name, term in module(maps, maps).items()} == {
        "vertex": 0.0,
        "edge": 0.0,
        "spectral": 0.0,
    }
    assert module.describe()[0]["spectral_pairs"] == 0


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("mode", SPECTRAL_MODES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_known_teacher_graph_gives_the_bits_that_the_teachers_maps_do(
    mode: str, weights: str, centre: bool
):
    student, teacher = level_features()
    # it was made by a run of another temperature, dimension and form
    maker = make_module(temperature=2.0, dim=1, weights=weights, centre=centre)
    known = {k: maker.with_spectrum(maker.teacher_graph(k, maps)) for k, maps in teacher.items()}
    for level, wide in ((1, False), (3, True)):
        spectrum = known[level].spectrum
        assert spectrum is not None
        assert (spectrum[1].shape[1] < TEACHER_SHAPES[level][0]) is wide
    # the graph of level 3 has no fifth pair
    for dim, temperature, attention in ((1, 0.5, "outer"), (3, 0.1, "softmax"), (5, 3.0, "outer")):
        module = make_module(
            dim=dim,
            temperature=temperature,
            attention=attention,
            mode=mode,
            weights=weights,
            centre=centre,
        )
        results = []
        for given in (teacher, known):
            inputs = {level: maps.clone().requires_grad_() for level, maps in student.items()}
            terms = module(inputs, given)
            wanted = [*inputs.values(), *module.parameters()]
            results.append([*terms.values(), *torch.autograd.grad(sum(terms.values()), wanted)])
        assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))


def test_an_embedding_from_a_spectrum_is_of_a_dimension_that_the_map_has():
    maps = positive_maps(2, 6, 3, 3)
    graphs = ChannelGraphs(maps)
    spectrum = graphs.spectrum()
    for dim in (0, 6):
        with pytest.raises(ConfigError, match=f"1 to 5.*got {dim}"):
            graphs.embedding(dim, spectrum)


def gradients_of(module: GraphDistillationLoss, *, at_once: bool) -> list[Tensor]:
    """Return the gradients of two levels' maps and of all adapters, and the terms."""
    module.zero_grad()
    student = {k: positive_maps(7, *s).requires_grad_() for k, s in STUDENT_SHAPES.items()}
    teacher = {k: positive_maps(7, *s, seed=1) for k, s in TEACHER_SHAPES.items()}
    terms = (module.terms_with_gradient if at_once else module)(student, teacher)
    assert len(teacher) == (0 if at_once else 2)
    total = sum(module.term_weights[name] * term for name, term in terms.items())
    (3 * total).backward()
    gradients = [maps.grad for maps in student.values()]
    return gradients + [parameter.grad for parameter in module.parameters()] + [*terms.values()]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("mode", SPECTRAL_MODES)
def test_parts_threads_and_when_gradients_are_taken_change_nothing(
    mode: str, adapter: str, monkeypatch: pytest.MonkeyPatch
):
    module = make_module(mode=mode, adapter=adapter).double()
    whole = gradients_of(module, at_once=False)
    threads = torch.get_num_threads()
    # parts of two samples and a rest of one, at the level with the smaller maps
    monkeypatch.setattr("raygkd.accelerated.parts.PART_BYTES", 2 * 8 * 8 * 2 * 2)
    try:
        for torch_threads, at_once in itertools.product((1, 2), (False, True)):
            torch.set_num_threads(torch_threads)
            for found, expected in zip(gradients_of(module, at_once=at_once), whole, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
            assert torch.get_num_threads() == torch_threads
    finally:
        torch.set_num_threads(threads)


def test_a_gradient_taken_with_the_terms_is_for_their_weights_and_only_once():
    module = make_module()
    student, teacher = level_features()
    terms = module.terms_with_gradient(student, dict(teacher))
    with pytest.raises(RuntimeError, match="gradient was computed with different weights"):
        sum(terms.values()).backward(retain_graph=True)
    total = sum(module.term_weights[name] * term for name, term in terms.items())
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="allow one backward"):
        total.backward()


def test_gradients_taken_under_autocast_are_those_outside():
    module = make_module(adapter="normalised")
    gradients = []
    for enabled in (False, True):
        module.zero_grad()
        student, teacher = level_features()
        for maps in student.values():
            maps.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            terms = module.terms_with_gradient(student, teacher)
        sum(module.term_weights[name] * term for name, term in terms.items()).backward()
        parameters = [parameter.grad for parameter in module.parameters()]
        gradients.append([maps.grad for maps in student.values()] + parameters)
    for inside, outside in zip(*gradients, strict=True):
        torch.testing.assert_close(inside, outside, rtol=1e-5, atol=1e-7)


def test_terms_without_gradient_are_the_same():
    module = make_module()
    student, teacher = level_features()
    with torch.no_grad():
        terms = module(student, teacher)
    for name, term in module(student, teacher).items():
        assert not terms[name].requires_grad
        assert torch.equal(terms[name], term)


def test_module_leaves_out_terms_of_weight_zero():
    module = make_module(beta=0.0)
    assert module.term_weights == {"vertex": 1.0, "spectral": 3.0}
    assert module(*level_features()).keys() == module.term_weights.keys()


@pytest.mark.parametrize("mode", SPECTRAL_MODES)
@pytest.mark.parametrize("only", ["alpha", "beta", "gamma"])
def test_each_term_alone_reaches_student_and_every_adapter_but_not_the_teacher(
    only: str, mode: str
):
    weights = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0} | {only: 1.0}
    module = make_module(mode=mode, **weights)
    student, teacher = level_features()
    for maps in (*student.values(), *teacher.values()):
        maps.requires_grad_()
    (term,) = module(student, teacher).values()
    term.backward()
    for parameter in module.parameters():
        assert parameter.grad.abs().max() > 0
    assert all(maps.grad.abs().max() > 0 for maps in student.values())
    assert all(maps.grad is None for maps in teacher.values())


@pytest.mark.parametrize("mode", SPECTRAL_MODES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_term_falls_when_student_features_and_adapters_are_trained(mode: str, weights: str):
    module = make_module(mode=mode, weights=weights)
    student, teacher = level_features()
    parameters = [*module.parameters(), *(maps.requires_grad_() for maps in student.values())]
    optimiser = torch.optim.Adam(parameters, lr=0.02)
    first = module(student, teacher)
    for _ in range(80):
        optimiser.zero_grad()
        sum(module(student, teacher).values()).backward()
        optimiser.step()
    last = module(student, teacher)
    assert all(last[name] < 0.5 * first[name] for name in first)


def test_module_weighs_positions_of_each_level_by_its_common_grid():
    module = make_module(foreground=0.7, canvas=64, gamma=0.0)
    student, teacher = level_features()
    shallow = module.adapters["1"](F.avg_pool2d(student[1], 2)), teacher[1]
    deep = module.adapters["3"](student[3]), F.avg_pool2d(teacher[3], 2)
    vertex = [
        vertex_loss(*maps, 0.5, foreground_weights(BOXES, 64, grid, 0.7))
        for maps, grid in ((shallow, (3, 3)), (deep, (2, 2)))
    ]
    terms = module(student, teacher, BOXES)
    torch.testing.assert_close(terms["vertex"], sum(vertex) / 2)
    plain = make_module(gamma=0.0)(student, teacher, BOXES)
    assert torch.equal(terms["edge"], plain["edge"])
    assert (terms["vertex"] - plain["vertex"]).abs() > 1e-3 * plain["vertex"]


def test_module_without_foreground_weighting_takes_no_notice_of_boxes():
    terms = make_module()(*level_features())
    with_boxes = make_module(canvas=64)(*level_features(), BOXES)
    assert all(torch.equal(terms[name], with_boxes[name]) for name in terms)


def test_module_with_foreground_weighting_asks_for_boxes():
    module = make_module(foreground=0.5, canvas=64)
    with pytest.raises(ConfigError, match="foreground weighting needs boxes"):
        module(*level_features())


def test_adapters_start_as_the_identity_folded_or_repeated():
    shapes = {1: (4, 2, 2), 2: (3, 2, 2), 3: (3, 2, 2)}
    wanted = {1: (2, 2, 2), 2: (3, 2, 2), 3: (5, 2, 2)}
    module = make_module(student_shapes=shapes, teacher_shapes=wanted, dim=1)
    a, b, c, d = positive_maps(4, 1, 1, 2, 2, dtype=torch.float32)
    folded = module.adapters["1"](torch.cat([a, b, c, d], 1))
    same = module.adapters["2"](torch.cat([a, b, c], 1))
    repeated = module.adapters["3"](torch.cat([a, b, c], 1))
    torch.testing.assert_close(folded, torch.cat([(a + c) / 2, (b + d) / 2], 1))
    torch.testing.assert_close(same, torch.cat([a, b, c], 1))
    torch.testing.assert_close(repeated, torch.cat([a, b, c, a, b], 1))
    assert all(adapter.conv.bias is None for adapter in module.adapters.values())


def test_normalised_adapters_start_as_the_identity_of_normalised_maps():
    module = make_module(adapter="normalised")
    plain = make_module()
    student, _ = level_features()
    for level, maps in student.items():
        convolved = plain.adapters[str(level)](maps)
        wanted = (convolved - convolved.mean((0, 2, 3), keepdim=True)) / convolved.std(
            (0, 2, 3), correction=0, keepdim=True
        )
        torch.testing.assert_close(module.adapters[str(level)](maps), wanted, atol=1e-3, rtol=1e-3)
    assert [row["adapter"] for row in module.describe()] == [
        "1x1 conv 4 -> 6, batch norm",
        "1x1 conv 8 -> 8, batch norm",
    ]


@pytest.mark.parametrize("width", [6, 12])
def test_normalised_adapters_are_a_convolution_and_batch_normalisation(width: int):
    """The statistics that follow from the inputs' moments are those of the outputs."""
    adapter = Adapter(8, width, "normalised").double()
    plain = NormalisedConvolution(8, width).double()
    with torch.no_grad():
        adapter.conv.weight.copy_(torch.randn_like(adapter.conv.weight))
        adapter.norm.weight.uniform_(0.5, 2.0)
        adapter.norm.bias.uniform_(-1.0, 1.0)
        plain[0].load_state_dict(adapter.conv.state_dict())
        plain[1].load_state_dict(adapter.norm.state_dict())
    maps = positive_maps(4, 8, 3, 5)
    weights = positive_maps(4, width, 3, 5, seed=1)
    for training in (True, True, False):
        found = []
        for module in (adapter.train(training), plain.train(training)):
            inputs = maps.clone().requires_grad_()
            outputs = module(inputs)
            gradients = torch.autograd.grad(
                (outputs * weights).sum(), [inputs, *module.parameters()]
            )
            found.append([outputs, *gradients, *module.buffers()])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_large_weights_do_not_blow_up_behind_normalised_adapters():
    """Steps at which the plain convolution diverges: the student's maps are large and alike."""
    shapes = {1: (32, 4, 4)}
    student, teacher = (positive_maps(8, *shapes[1], seed=s, dtype=torch.float32) for s in (0, 1))
    ends = {}
    for adapter in ADAPTERS:
        settings = {"student_shapes": shapes, "teacher_shapes": shapes, "adapter": adapter}
        module = make_module(**settings, alpha=300.0, beta=0.0, gamma=0.0)
        optimiser = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
        terms = []
        for _ in range(30):
            (term,) = module({1: 3.0 + student}, {1: teacher}).values()
            optimiser.zero_grad()
            (300.0 * term).backward()
            optimiser.step()
            terms.append(float(term.detach()))
        ends[adapter] = terms[-1] / terms[0]
    assert not ends["plain"] < 1e6
    assert ends["normalised"] < 1.0


def test_module_describes_its_levels():
    module = make_module(dim=5)
    assert module.describe() == [
        {
            "level": 1,
            "student_shape": (4, 6, 6),
            "teacher_shape": (6, 3, 3),
            "grid": (3, 3),
            "adapter": "1x1 conv 4 -> 6",
            "spectral_dim": 5,
            "spectral_pairs": 5,
        },
        {
            "level": 3,
            "student_shape": (8, 2, 2),
            "teacher_shape": (8, 4, 4),
            "grid": (2, 2),
            "adapter": "1x1 conv 8 -> 8",
            "spectral_dim": 5,
            "spectral_pairs": 4,
        },
    ]


def test_module_reports_all_wrong_settings_at_once():
    with pytest.raises(ConfigError) as raised:
        make_module(
            temperature=-1.0,
            dim=6,
            alpha=-1.0,
            mode="x",
            attention="y",
            weights="z",
            gamma=math.nan,
        )
    message = str(raised.value)
    assert "\n" not in message
    for part in (
        "temperature must be a finite number above 0; got -1.0",
        "unknown spectral mode 'x' (allowed: residual, subspace, procrustes)",
        "unknown attention mode 'y'",
        "unknown graph weights 'z'",
        "alpha must be a finite number, 0 or above; got -1.0",
        "gamma must be a finite number, 0 or above; got nan",
        "level 1: dim must be from 1 to 5 for a map of 6 channels",
    ):
        assert part in message
    assert "level 3" not in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.0, "beta": 0.0, "gamma": 0.0}, "alpha, beta, gamma are all 0"),
        ({"student_shapes": {}, "teacher_shapes": {}}, "no levels; choose at least one"),
        ({"student_shapes": {1: (4, 6, 6)}}, r"the same levels; got \[1\] and \[1, 3\]"),
        ({"dim": 0}, "^level 1: .* got 0$"),
        ({"dim": 6, "teacher_shapes": {1: (6, 4, 4), 3: (6, 2, 2)}}, "^levels 1, 3: .* got 6$"),
        ({"foreground": 1.5}, r"share must be from 0 to 1; got 1\.5; .* needs canvas"),
    ],
)
def test_module_refuses_wrong_settings(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        make_module(**changes)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ({3: None}, {}, r"^no features of level 3 \(available: 1\)$"),
        ({}, {1: None, 3: None}, r"^no features of level 1, 3 \(available: none\)$"),
        ({1: (0, 4, 6, 6)}, {1: (0, 6, 3, 3)}, r"level 1 must .*; got \(0, 4, .* and \(0, 6, "),
        ({3: (8, 2, 2)}, {}, r"level 3 must be \(B, C, H, W\), .*; got \(8, 2, 2\) and \("),
        ({3: (9, 8, 2, 2)}, {}, r"level 3 must .* same B .*; got \(9, 8, 2, 2\) and \("),
    ],
)
def test_module_refuses_wrong_maps_in_one_line(
    student: dict[int, Any], teacher: dict[int, Any], message: str, at_once: bool
):
    module = make_module()
    sides = level_features()
    for maps, changes in zip(sides, (student, teacher), strict=True):
        for level, shape in changes.items():
            del maps[level]
            if shape:
                maps[level] = torch.zeros(shape)
    with pytest.raises(ConfigError, match=message) as raised:
        (module.terms_with_gradient if at_once else module)(*sides)
    assert "\n" not in str(raised.value)
