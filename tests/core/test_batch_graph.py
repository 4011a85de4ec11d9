"""Edges and spectrum of one graph of channels for a whole batch.

Shape letters: B batch, C channels, H height, W width, d spectral dimension.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from raygkd.losses import GraphDistillationLoss
from raygkd.losses.adapters import Adapter, channel_moments
from raygkd.losses.batch_graph import (
    VARIANCE_FLOOR,
    batch_edge_loss,
    batch_spectral_loss,
    correlations,
)

SHAPES = {1: (5, 4, 4), 2: (6, 2, 2)}
TEACHER_SHAPES = {1: (7, 4, 4), 2: (6, 2, 2)}


def maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, dtype=dtype, generator=generator) + 0.01


def covariance(channels: int, seed: int) -> Tensor:
    return channel_moments(maps(4, channels, 3, 3, seed=seed))[1]


LOSSES = {
    "edge": batch_edge_loss,
    "spectral": lambda student_CC, teacher_CC: batch_spectral_loss(student_CC, teacher_CC, 3),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def test_moments_are_those_of_all_positions_and_pass_gradcheck():
    maps_BCHW = maps(4, 5, 3, 2)
    rows_CE = maps_BCHW.transpose(0, 1).flatten(1)
    mean_C, covariance_CC = channel_moments(maps_BCHW)
    torch.testing.assert_close(mean_C, rows_CE.mean(1))
    torch.testing.assert_close(covariance_CC, torch.cov(rows_CE, correction=0))
    assert gradcheck(channel_moments, maps_BCHW.requires_grad_())


def test_variances_keep_their_digits_where_means_are_large():
    maps_BCHW = maps(4, 3, 8, 8, dtype=torch.float32)
    shifted_CC = channel_moments(maps_BCHW + 1000.0)[1]
    torch.testing.assert_close(shifted_CC, channel_moments(maps_BCHW)[1], rtol=1e-3, atol=1e-5)


def test_correlations_are_pearsons_but_for_channels_that_hardly_vary():
    covariance_CC = covariance(6, 0)
    found_CC = correlations(covariance_CC)
    deviations_C = covariance_CC.diagonal().sqrt()
    pearson_CC = covariance_CC / deviations_C[:, None] / deviations_C
    torch.testing.assert_close(found_CC, pearson_CC / (1 + VARIANCE_FLOOR), atol=0.02, rtol=0)
    faint = torch.ones(6, dtype=torch.float64)
    faint[2] = 1e-6
    found_CC = correlations(covariance_CC * faint[:, None] * faint)
    assert found_CC[2].abs().max() < 1e-4
    assert correlations(torch.zeros(3, 3)).abs().max() == 0


def test_edges_are_the_weighted_mean_over_pairs_without_the_diagonal():
    student_CC, teacher_CC = covariance(5, 0), covariance(5, 1)
    ours, theirs = correlations(student_CC), correlations(teacher_CC)
    deviations = teacher_CC.diagonal().sqrt().tolist()
    total = weighted = 0.0
    for i in range(5):
        for j in range(5):
            if i != j:
                weight = deviations[i] * deviations[j]
                total += weight
                weighted += weight * float((theirs[i, j] - ours[i, j]) ** 2)
    assert float(batch_edge_loss(student_CC, teacher_CC)) == pytest.approx(weighted / total)


def test_the_spectral_loss_is_of_the_eigenpairs_of_the_normalised_graph():
    student_CC, teacher_CC = covariance(6, 0), covariance(6, 1)

    def graph(covariance_CC: Tensor) -> Tensor:
        weights_CC = (1 + correlations(covariance_CC)) / 2
        root_CC = weights_CC.sum(1).rsqrt().diag()
        return root_CC @ weights_CC @ root_CC

    # with its trivial pair, and that left out
    values_C, vectors_CC = torch.linalg.eigh(graph(teacher_CC))
    assert float(values_C[-1]) == pytest.approx(1.0)
    values_C, vectors_CC = values_C[:-1].flip(0), vectors_CC[:, :-1].flip(1)
    cut = (values_C[2] + values_C[3]) / 2
    error = power = 0.0
    student_weights_CC = (1 + correlations(student_CC)) / 2
    degrees_C = student_weights_CC.sum(1)
    trivial_C = (degrees_C / degrees_C.sum()).sqrt()
    student_graph_CC = graph(student_CC) - trivial_C[:, None] * trivial_C
    for value, vector_C in zip(values_C, vectors_CC.T, strict=True):
        share = 1 / (1 + (cut / value) ** 8)
        error += share * (student_graph_CC @ vector_C - value * vector_C).square().sum()
        power += share * value**2
    # the teacher's trivial vector is no eigenvector of the deflated one's weights: its share is 0
    found = batch_spectral_loss(student_CC, teacher_CC, 3)
    torch.testing.assert_close(found, error / power)


def test_the_spectral_loss_does_not_see_which_vectors_stand_for_a_repeated_eigenvalue():
    """Channels come in two independent copies, so that eigenvalues are there twice."""
    block_CC = covariance(3, 1)
    teacher_CC = torch.block_diag(block_CC, block_CC)
    student_CC = covariance(6, 0)
    order = torch.tensor([3, 4, 5, 0, 1, 2])
    for dim in (1, 2, 3):
        one = batch_spectral_loss(student_CC, teacher_CC, dim)
        other = batch_spectral_loss(student_CC[order][:, order], teacher_CC[order][:, order], dim)
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@each_loss
def test_losses_pass_gradcheck_and_give_the_teacher_none(loss: Any):
    student_CC, teacher_CC = covariance(5, 0).requires_grad_(), covariance(5, 1).requires_grad_()
    assert gradcheck(lambda given_CC: loss((given_CC + given_CC.T) / 2, teacher_CC), student_CC)
    loss(student_CC, teacher_CC).backward()
    assert teacher_CC.grad is None


@each_loss
def test_losses_are_zero_for_equal_graphs_and_keep_to_scale_and_order(loss: Any):
    student_CC, teacher_CC = covariance(5, 0), covariance(5, 1)
    assert float(loss(teacher_CC, teacher_CC)) == pytest.approx(0.0, abs=1e-12)
    wanted = loss(student_CC, teacher_CC)
    torch.testing.assert_close(loss(100 * student_CC, 0.01 * teacher_CC), wanted)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    shuffled = loss(student_CC[order][:, order], teacher_CC[order][:, order])
    torch.testing.assert_close(shuffled, wanted)


@each_loss
def test_the_gradient_of_a_dying_channel_is_bounded_and_does_not_jump(loss: Any):
    teacher_CC, student = covariance(5, 1), maps(4, 5, 3, 3)
    sizes = []
    for size in (1.0, 1e-1, 1e-2, 1e-4, 1e-8, 0.0):
        scaled = student.clone()
        scaled[:, 0] *= size
        scaled.requires_grad_()
        loss(channel_moments(scaled)[1], teacher_CC).backward()
        assert scaled.grad is not None
        assert scaled.grad.isfinite().all()
        sizes.append(float(scaled.grad[:, 0].norm()))
    assert max(sizes) < 20 * sizes[0]
    assert sizes[-1] == pytest.approx(sizes[-2], rel=1e-3)


@each_loss
def test_maps_without_any_variance_have_a_finite_gradient(loss: Any):
    for student, teacher in ((True, False), (False, True), (True, True)):
        ours = torch.full((4, 5, 3, 3), 0.3) if student else maps(4, 5, 3, 3, dtype=torch.float32)
        theirs = torch.zeros(5, 5) if teacher else covariance(5, 1).float()
        ours.requires_grad_()
        value = loss(channel_moments(ours)[1], theirs)
        value.backward()
        assert value.isfinite()
        assert ours.grad is not None
        assert ours.grad.isfinite().all()


@each_loss
def test_nan_reaches_the_loss(loss: Any):
    broken_CC = covariance(5, 0)
    broken_CC[1, 2] = math.nan
    assert loss(broken_CC, covariance(5, 1)).isnan()
    assert loss(covariance(5, 0), broken_CC).isnan()


def module_of(**settings: Any) -> GraphDistillationLoss:
    torch.manual_seed(0)
    weights = {"alpha": 1.0, "beta": 2.0, "gamma": 3.0}
    settings = {"adapter": "normalised", "dim": 3, **weights, **settings}
    return GraphDistillationLoss(
        SHAPES, TEACHER_SHAPES, temperature=0.5, graphs="batch", **settings
    )


def features(dtype: torch.dtype = torch.float32) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    return (
        {level: maps(6, *shape, dtype=dtype) for level, shape in SHAPES.items()},
        {level: maps(6, *shape, seed=1, dtype=dtype) for level, shape in TEACHER_SHAPES.items()},
    )


@pytest.mark.parametrize("adapter", ["plain", "normalised"])
@pytest.mark.parametrize("centre", [False, True])
def test_the_module_takes_the_covariance_of_what_leaves_the_adapter(adapter: str, centre: bool):
    module = module_of(adapter=adapter, centre=centre).double()
    student, teacher = features(torch.float64)
    terms = module(student, teacher)
    wanted = {"edge": 0.0, "spectral": 0.0}
    for level in SHAPES:
        ours_CC = channel_moments(module.student_maps(level, student[level]))[1]
        theirs_CC = channel_moments(module.teacher_graph(level, teacher[level]).maps_BCHW)[1]
        wanted["edge"] += float(batch_edge_loss(ours_CC, theirs_CC).detach()) / 2
        wanted["spectral"] += float(batch_spectral_loss(ours_CC, theirs_CC, 3).detach()) / 2
    for name, value in wanted.items():
        assert float(terms[name].detach()) == pytest.approx(value)


@pytest.mark.parametrize("settings", [{}, {"alpha": 0.0}, {"beta": 0.0}, {"gamma": 0.0}], ids=str)
def test_terms_and_gradients_are_the_same_when_they_are_taken_at_once(settings: dict[str, Any]):
    found = []
    for at_once in (False, True):
        module = module_of(**settings)
        student, teacher = features()
        student = {level: one.requires_grad_() for level, one in student.items()}
        weights = [0.5 * weight for weight in module.term_weights.values()]
        terms = (
            module.terms_with_gradient(student, teacher, weights=weights)
            if at_once
            else module(student, teacher)
        )
        total = sum(w * term for w, term in zip(weights, terms.values(), strict=True))
        inputs = [*student.values(), *(p for p in module.parameters() if p.requires_grad)]
        found.append([*terms.values(), *torch.autograd.grad(total, inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_an_adapter_takes_moments_that_are_known():
    adapter = Adapter(5, 7, "normalised")
    maps_BCHW = maps(4, 5, 3, 3, dtype=torch.float32)
    known = adapter.mixing(maps_BCHW, channel_moments(maps_BCHW))
    for one, other in zip(known, adapter.mixing(maps_BCHW), strict=True):
        torch.testing.assert_close(one, other)


def test_the_graph_of_a_batch_has_all_of_its_pairs_on_small_grids():
    rows = module_of(dim=5).describe()
    assert [(row["spectral_dim"], row["spectral_pairs"]) for row in rows] == [(5, 5), (5, 5)]
