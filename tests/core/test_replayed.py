"""The graph losses as a GPU has them: leading eigenpairs by products, terms with their gradient.

All but the CUDA graphs themselves runs on a CPU too; what needs a GPU is skipped without one.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from raygkd.accelerated.captured import Captured
from raygkd.accelerated.replayed import ReplayedTerms, can_be_replayed
from raygkd.accelerated.subspace import leading_subspace
from raygkd.graph import ChannelGraphs
from raygkd.losses import GraphDistillationLoss

STUDENT = {1: (24, 12, 12), 2: (32, 6, 6), 3: (40, 3, 3)}
TEACHER = {1: (16, 12, 12), 2: (48, 6, 6), 3: (96, 6, 6)}
WEIGHTS = {"alpha": 2.0, "beta": 0.5, "gamma": 1.0}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def maps_of(shapes: Mapping[int, tuple[int, ...]], seed: int) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {level: torch.rand(5, *shape, generator=generator) for level, shape in shapes.items()}


def a_loss(**settings: Any) -> GraphDistillationLoss:
    settings = {"adapter": "normalised", **WEIGHTS, **settings}
    return GraphDistillationLoss(STUDENT, TEACHER, temperature=0.5, dim=4, **settings)


def with_gradients(
    loss: GraphDistillationLoss, terms: Any, students: Mapping[int, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return terms, and the gradients of their weighted sum times 3."""
    terms_T = torch.stack(list(terms.values())) if isinstance(terms, dict) else terms
    weights_T = torch.tensor(list(loss.term_weights.values()), device=terms_T.device)
    inputs = [*students.values(), *loss.parameters()]
    return terms_T.detach(), list(torch.autograd.grad(3 * (terms_T * weights_T).sum(), inputs))


def weights_of(loss: GraphDistillationLoss) -> list[float]:
    return list(loss.term_weights.values())


def leaves(maps: Mapping[int, Tensor], device: str = "cpu") -> dict[int, Tensor]:
    return {level: one.to(device).requires_grad_() for level, one in maps.items()}


def graph_matrices(maps_BCN: Tensor) -> Tensor:
    return ChannelGraphs(maps_BCN[..., None]).smaller_matrix()


def pairs_of(matrix_BPP: Tensor, count: int) -> tuple[Tensor, Tensor]:
    basis_BPQ, ritz_BQQ = leading_subspace(matrix_BPP)
    values_BQ, rotations_BQQ = torch.linalg.eigh(ritz_BQQ)
    return values_BQ.flip(1)[:, :count], basis_BPQ @ rotations_BQQ.flip(2)[:, :, :count]


def rectified_patterns(batch: int, channels: int, side: int) -> Tensor:
    """Smooth positive maps, whose spectra fall as those of a network's."""
    coarse = torch.randn(batch, channels, side // 4, side // 4)
    maps = torch.nn.functional.interpolate(coarse, side, mode="bilinear") + 0.3
    return (maps + 0.1 * torch.randn_like(maps)).relu().flatten(2)


@pytest.mark.parametrize(("channels", "side"), [(48, 8), (128, 16), (256, 8), (300, 5), (24, 8)])
def test_leading_subspace_holds_the_leading_eigenpairs(channels: int, side: int):
    torch.manual_seed(0)
    matrix_BPP = graph_matrices(rectified_patterns(6, channels, side))
    values_Bd, vectors_BPd = pairs_of(matrix_BPP, 8)
    wanted_BP = torch.linalg.eigvalsh(matrix_BPP.double()).flip(1)
    scale_B = wanted_BP[:, 0]
    error_Bd = (values_Bd - wanted_BP[:, : values_Bd.shape[1]]).abs() / scale_B[:, None]
    assert error_Bd.max() < 1e-5
    residual_BPd = matrix_BPP @ vectors_BPd - vectors_BPd * values_Bd[:, None]
    assert (residual_BPd.norm(dim=1) / scale_B[:, None]).max() < 2e-3
    gram_Bdd = vectors_BPd.mT @ vectors_BPd
    torch.testing.assert_close(gram_Bdd, torch.eye(gram_Bdd.shape[1]).expand_as(gram_Bdd))


def test_leading_subspace_of_few_patterns_is_orthonormal_and_finds_all_of_them():
    torch.manual_seed(0)
    maps_BCN = torch.rand(4, 128, 3) @ torch.rand(4, 3, 256)
    matrix_BPP = graph_matrices(maps_BCN)
    values_Bd, vectors_BPd = pairs_of(matrix_BPP, 8)
    wanted_BP = torch.linalg.eigvalsh(matrix_BPP.double()).flip(1)
    torch.testing.assert_close(
        values_Bd.double(), wanted_BP[:, :8], rtol=0, atol=2e-6 * float(wanted_BP.max())
    )
    gram_Bdd = vectors_BPd.mT @ vectors_BPd
    torch.testing.assert_close(gram_Bdd, torch.eye(8).expand_as(gram_Bdd))


def test_leading_subspace_of_nothing_is_a_basis_and_of_nan_is_nan():
    matrix_BPP = torch.zeros(2, 50, 50)
    matrix_BPP[1, 3, 4] = torch.nan
    basis_BPQ, ritz_BQQ = leading_subspace(matrix_BPP)
    torch.testing.assert_close(basis_BPQ[0].mT @ basis_BPQ[0], torch.eye(32))
    assert basis_BPQ[1].isnan().all()
    assert ritz_BQQ.abs().max() == 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"adapter": "plain"},
        {"centre": True},
        {"attention": "softmax"},
        {"weights": "cosine"},
        {"gamma": 0.0},
        {"graphs": "batch", "gamma": 0.0},
        {"graphs": "batch", "gamma": 0.0, "centre": True},
        {"alpha": 0.0, "beta": 0.0},
    ],
    ids=str,
)
def test_terms_and_gradients_are_those_of_the_plain_loss(settings: dict[str, Any]):
    loss = a_loss(**settings)
    plain = copy.deepcopy(loss)
    students, teachers = maps_of(STUDENT, 1), maps_of(TEACHER, 2)
    own = leaves(students)
    got_T, got = with_gradients(
        loss, ReplayedTerms()(loss, own, dict(teachers), {}, weights_of(loss)), own
    )
    own = leaves(students)
    wanted_T, wanted = with_gradients(plain, plain(own, teachers), own)
    torch.testing.assert_close(got_T, wanted_T, rtol=1e-4, atol=1e-6)
    for one, other in zip(got, wanted, strict=True):
        limit = max(1e-6, 1e-4 * float(other.abs().max()))
        torch.testing.assert_close(one, other, rtol=1e-3, atol=limit)
    for one, other in zip(loss.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_what_has_begun_for_another_batch_is_not_taken():
    loss, replayed = a_loss(), ReplayedTerms()
    students, others, teachers = maps_of(STUDENT, 1), maps_of(TEACHER, 3), maps_of(TEACHER, 2)
    replayed.begin(loss, {level: maps[:4] for level, maps in others.items()})
    own = leaves(students)
    got_T, _ = with_gradients(loss, replayed(loss, own, dict(teachers), {}, weights_of(loss)), own)
    wanted_T, _ = with_gradients(loss, loss(own, teachers), own)
    torch.testing.assert_close(got_T, wanted_T, rtol=1e-4, atol=1e-6)


def test_known_spectra_and_weights_of_positions_enter_as_they_do_plainly():
    loss = a_loss(foreground=0.5, canvas=48)
    students, teachers = maps_of(STUDENT, 1), maps_of(TEACHER, 2)
    graphs = {
        level: loss.with_spectrum(loss.teacher_graph(level, maps))
        for level, maps in teachers.items()
    }
    boxes = [torch.tensor([[4.0, 4.0, 20.0, 30.0]])] * 5
    own = leaves(students)
    of_positions = loss.position_weights(boxes)
    terms_T = ReplayedTerms()(loss, own, dict(graphs), of_positions, weights_of(loss))
    got_T, got = with_gradients(loss, terms_T, own)
    own = leaves(students)
    wanted_T, wanted = with_gradients(loss, loss(own, graphs, boxes), own)
    torch.testing.assert_close(got_T, wanted_T)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_gradient_is_refused_once_the_next_batch_is_there():
    loss, replayed = a_loss(), ReplayedTerms()
    own = leaves(maps_of(STUDENT, 1))
    terms_T = replayed(loss, own, maps_of(TEACHER, 2), {}, weights_of(loss))
    fewer = {level: maps[:2] for level, maps in own.items()}
    teachers = {level: maps[:2] for level, maps in maps_of(TEACHER, 2).items()}
    replayed(loss, fewer, teachers, {}, weights_of(loss))
    with pytest.raises(RuntimeError, match="the terms of the next batch"):
        with_gradients(loss, terms_T, own)


def test_what_is_not_on_a_gpu_is_not_replayed():
    assert not can_be_replayed(a_loss(), maps_of(STUDENT, 1))


def test_copies_of_a_loss_have_no_graphs():
    captured = Captured()
    captured(lambda tensor: (tensor,), [torch.zeros(1)])
    assert not copy.deepcopy(captured)._graphs
    assert not pickle.loads(pickle.dumps(captured))._graphs


@needs_gpu
@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=str)
def test_replays_on_a_gpu_are_the_loss_of_a_cpu(amp: torch.dtype | None):
    loss = a_loss()
    on_gpu = copy.deepcopy(loss).cuda()
    dtype = amp or torch.float32
    for seed in range(6):
        students = {level: maps.to(dtype) for level, maps in maps_of(STUDENT, seed).items()}
        teachers = {level: maps.to(dtype) for level, maps in maps_of(TEACHER, seed + 9).items()}
        own = leaves(students)
        wanted_T, wanted = with_gradients(loss, loss(own, teachers), own)
        own = leaves(students, "cuda")
        assert can_be_replayed(on_gpu, own)
        taken = {level: maps.cuda() for level, maps in teachers.items()}
        with torch.autocast("cuda", dtype=amp, enabled=amp is not None):
            terms = on_gpu.terms_with_gradient(own, taken)
        got_T, got = with_gradients(on_gpu, terms, own)
        torch.testing.assert_close(got_T.cpu(), wanted_T, rtol=1e-4, atol=1e-6)
        for one, other in zip(got, wanted, strict=True):
            limit = max(1e-6, (1e-4 if amp is None else 2e-2) * float(other.abs().max()))
            torch.testing.assert_close(one.cpu(), other, rtol=2e-2, atol=limit)
    for one, other in zip(on_gpu.buffers(), loss.buffers(), strict=True):
        torch.testing.assert_close(one.cpu(), other)


@needs_gpu
def test_batches_of_new_shapes_are_taken_as_they_come():
    loss = a_loss().cuda()
    for size in (5, 5, 3, 4, 5, 3, 2):
        own = leaves({k: v[:size].clone() for k, v in maps_of(STUDENT, size).items()}, "cuda")
        teachers = {k: v[:size].cuda() for k, v in maps_of(TEACHER, size).items()}
        plain = copy.deepcopy(loss)
        wanted_T, _ = with_gradients(plain, plain(own, teachers), own)
        got_T, _ = with_gradients(loss, loss.terms_with_gradient(own, teachers), own)
        torch.testing.assert_close(got_T, wanted_T, rtol=1e-4, atol=1e-6)
