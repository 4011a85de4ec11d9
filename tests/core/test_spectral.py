"""The spectral embedding against a dense float64 reference, and on graphs without a clear spectrum.

Shape letters: B batch, C channels, H height, W width, K columns of the factor, P side of a matrix,
d spectral dimension.
"""

import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from raygkd.errors import ConfigError
from raygkd.graph import (
    WEIGHTS,
    adjacency,
    deflated_factor,
    nontrivial_pairs,
    normalised_factor,
    spectral_embedding,
)
from raygkd.graph.eigen import leading_pairs

# (B, C, H, W): the factor's side is smaller in the first two, C in the last two.
SHAPES = [(2, 12, 2, 2), (2, 9, 2, 3), (2, 5, 3, 3), (2, 6, 4, 4)]


def positive_maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)) + 0.01


def maps_for(weights: str, shape: tuple[int, ...]) -> Tensor:
    """Return maps that have negative cosines where the weights allow them."""
    return positive_maps(*shape) - (0.5 if weights == "shifted" else 0.0)


def dense_graph(features_BCHW: Tensor, weights: str) -> tuple[Tensor, Tensor]:
    """Return S (B, C, C) and u0 (B, C), written as in the definition."""
    cosines_BCC = adjacency(features_BCHW)
    weights_BCC = (1 + cosines_BCC) / 2 if weights == "shifted" else cosines_BCC
    degrees_BC = weights_BCC.sum(2)
    roots_BC = degrees_BC.sqrt()
    normalised_BCC = weights_BCC / (roots_BC[:, :, None] * roots_BC[:, None, :])
    return normalised_BCC, roots_BC / degrees_BC.sum(1, keepdim=True).sqrt()


def dense_embedding(features_BCHW: Tensor, dim: int, weights: str) -> tuple[Tensor, Tensor]:
    """Return the embedding by torch's own eigendecomposition of S' and its own gradient."""
    normalised_BCC, trivial_BC = dense_graph(features_BCHW, weights)
    values_BC, vectors_BCC = torch.linalg.eigh(
        normalised_BCC - trivial_BC[:, :, None] * trivial_BC[:, None, :]
    )
    return values_BC.flip(1)[:, :dim], vectors_BCC.flip(2)[:, :, :dim]


def same_signs(vectors_BCd: Tensor, reference_BCd: Tensor) -> Tensor:
    """Flip vectors to agree with those of a reference."""
    return vectors_BCd * (vectors_BCd * reference_BCd).sum(1, keepdim=True).sign().detach()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_embedding_equals_the_dense_computation_in_values_and_gradients(
    shape: tuple[int, ...], weights: str
):
    dim = 3
    fast_BCHW = maps_for(weights, shape).requires_grad_()
    dense_BCHW = fast_BCHW.detach().clone().requires_grad_()
    dense_values, dense_vectors = dense_embedding(dense_BCHW, dim, weights)
    fast_values, fast_vectors = spectral_embedding(fast_BCHW, dim, weights)
    fast_vectors = same_signs(fast_vectors, dense_vectors)
    torch.testing.assert_close(fast_values, dense_values, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(fast_vectors, dense_vectors, rtol=1e-8, atol=1e-8)

    probe_BCd = torch.sin(torch.arange(dense_vectors.numel())).reshape(dense_vectors.shape)
    for values, vectors in ((fast_values, fast_vectors), (dense_values, dense_vectors)):
        ((vectors * probe_BCd).sum() + (values * probe_BCd[:, 0]).sum()).backward()
    assert dense_BCHW.grad.abs().max() > 0.1
    torch.testing.assert_close(fast_BCHW.grad, dense_BCHW.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", [(1, 7, 2, 2), (1, 4, 2, 3)])
def test_embedding_passes_gradcheck(shape: tuple[int, ...], weights: str):
    features_BCHW = maps_for(weights, shape).requires_grad_()
    assert gradcheck(lambda maps: spectral_embedding(maps, 2, weights), features_BCHW)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_factor_and_trivial_vector_are_those_of_the_dense_graph(
    shape: tuple[int, ...], weights: str
):
    features_BCHW = maps_for(weights, shape)
    normalised_BCC, trivial_BC = dense_graph(features_BCHW, weights)
    factor_BCK, fast_trivial_BC = normalised_factor(features_BCHW, weights)
    deflated_BCK = deflated_factor(features_BCHW, weights)
    outer_BCC = trivial_BC[:, :, None] * trivial_BC[:, None, :]
    torch.testing.assert_close(factor_BCK @ factor_BCK.mT, normalised_BCC)
    torch.testing.assert_close(fast_trivial_BC, trivial_BC)
    torch.testing.assert_close(normalised_BCC @ trivial_BC[:, :, None], trivial_BC[:, :, None])
    torch.testing.assert_close(deflated_BCK @ deflated_BCK.mT, normalised_BCC - outer_BCC)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_vectors_are_orthonormal_eigenvectors_without_the_trivial_one(
    shape: tuple[int, ...], dtype: torch.dtype, weights: str
):
    features_BCHW = maps_for(weights, shape).to(dtype)
    values_Bd, vectors_BCd = spectral_embedding(features_BCHW, 3, weights)
    factor_BCK, trivial_BC = normalised_factor(features_BCHW, weights)
    image_BCd = factor_BCK @ (factor_BCK.mT @ vectors_BCd)
    close = {"rtol": 0.0, "atol": 1e-5}
    torch.testing.assert_close(image_BCd, vectors_BCd * values_Bd[:, None, :], **close)
    torch.testing.assert_close(
        vectors_BCd.mT @ vectors_BCd, torch.eye(3, dtype=dtype).expand(2, 3, 3), **close
    )
    assert (trivial_BC[:, None, :] @ vectors_BCd).abs().max() < 1e-5
    assert (values_Bd.diff(dim=1) <= 0).all()
    assert values_Bd.max() <= 1 + 1e-6


def test_cosine_weights_take_the_positive_part_of_the_map():
    features_BCHW = positive_maps(2, 6, 3, 3) - 0.5
    for signed, rectified in zip(
        spectral_embedding(features_BCHW, 3, "cosine"),
        spectral_embedding(features_BCHW.relu(), 3, "cosine"),
    ):
        assert torch.equal(signed, rectified)


def test_dead_channel_is_isolated_with_cosine_weights():
    features_BCHW = positive_maps(1, 6, 2, 3)
    with_dead_BCHW = torch.cat([features_BCHW, torch.zeros(1, 1, 2, 3)], 1).requires_grad_()
    values_Bd, vectors_BCd = spectral_embedding(with_dead_BCHW, 3, "cosine")
    expected_Bd, expected_BCd = spectral_embedding(features_BCHW, 3, "cosine")
    torch.testing.assert_close(values_Bd, expected_Bd)
    torch.testing.assert_close(same_signs(vectors_BCd[:, :6], expected_BCd), expected_BCd)
    assert (vectors_BCd[:, 6] == 0).all()
    (values_Bd.sum() + (vectors_BCd**3).sum()).backward()
    assert (with_dead_BCHW.grad[:, 6] == 0).all()
    assert with_dead_BCHW.grad.isfinite().all()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_beyond_the_rank_are_zero(dtype: torch.dtype, weights: str):
    features_BCHW = positive_maps(2, 9, 2, 2, dtype=dtype).requires_grad_()
    pairs = nontrivial_pairs(9, 4, weights)
    assert pairs == {"shifted": 4, "cosine": 3}[weights]
    values_Bd, vectors_BCd = spectral_embedding(features_BCHW, 8, weights)
    assert (values_Bd[:, :pairs] > 0).all()
    assert (values_Bd[:, pairs:] == 0).all()
    assert (vectors_BCd[:, :, pairs:] == 0).all()
    (values_Bd.sum() + (vectors_BCd**3).sum()).backward()
    assert features_BCHW.grad.isfinite().all()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [9, 100])
def test_duplicate_channels_add_no_pairs(width: int, dtype: torch.dtype, weights: str):
    distinct_BCHW = positive_maps(2, 4, 1, width, dtype=dtype)
    values_Bd, vectors_BCd = spectral_embedding(distinct_BCHW.repeat(1, 16, 1, 1), 60, weights)
    assert (values_Bd[:, :3] > 0).all()
    assert (values_Bd[:, 3:] == 0).all()
    assert (vectors_BCd[:, :, 3:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("channels", "width"), [(4, 2), (300, 9), (64, 300)])
def test_complete_graph_has_no_nontrivial_pairs(dtype: torch.dtype, channels: int, width: int):
    scales_C = positive_maps(channels, seed=1, dtype=dtype)
    features_BCHW = positive_maps(2, 1, 1, width, dtype=dtype) * scales_C[:, None, None]
    for weights in WEIGHTS:
        values_Bd, vectors_BCd = spectral_embedding(features_BCHW, 3, weights)
        assert (values_Bd == 0).all()
        assert (vectors_BCd == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_disconnected_groups_are_told_apart_by_the_sign_of_the_first_vector(
    dtype: torch.dtype,
):
    map_BCHW = positive_maps(1, 1, 2, 3, dtype=dtype)
    features_BCHW = torch.cat([map_BCHW.repeat(1, 3, 1, 1), -map_BCHW.repeat(1, 4, 1, 1)], 1)
    values_Bd, vectors_BCd = spectral_embedding(features_BCHW, 2)
    torch.testing.assert_close(values_Bd, torch.tensor([[1.0, 0.0]], dtype=dtype))
    signs = vectors_BCd[0, :, 0].sign()
    assert (signs[:3] == signs[0]).all()
    assert (signs[3:] == -signs[0]).all()


@pytest.mark.parametrize("dim", [0, 6, 300])
def test_dimension_outside_the_range_names_it_and_the_range(dim: int):
    with pytest.raises(ConfigError, match=rf"dim must be from 1 to 5 .* 6 .* got {dim}$"):
        spectral_embedding(positive_maps(1, 6, 2, 2), dim)


def test_unknown_weights_are_refused():
    with pytest.raises(ConfigError, match=r"graph weights 'cosin'.*did you mean 'cosine'"):
        spectral_embedding(positive_maps(1, 6, 2, 2), 2, "cosin")


@pytest.mark.parametrize("shape", [(2, 9, 2, 2), (2, 4, 3, 3)])
def test_a_sample_that_is_not_finite_gives_nan_and_leaves_the_others(shape: tuple[int, ...]):
    features_BCHW = positive_maps(*shape)
    expected_d, _ = spectral_embedding(features_BCHW, 3)
    features_BCHW[0, 1] = float("inf")
    values_Bd, vectors_BCd = spectral_embedding(features_BCHW, 3)
    assert values_Bd[0].isnan().all()
    assert vectors_BCd[0].isnan().all()
    torch.testing.assert_close(values_Bd[1], expected_d[1])


@pytest.mark.parametrize("shape", [(2, 9, 2, 2), (2, 4, 3, 3)])
def test_embedding_under_autocast_equals_the_one_outside(shape: tuple[int, ...]):
    inside_BCHW = positive_maps(*shape, dtype=torch.float32).requires_grad_()
    outside_BCHW = inside_BCHW.detach().clone().requires_grad_()
    outside = spectral_embedding(outside_BCHW, 3)
    (outside[0].sum() + (outside[1] ** 3).sum()).backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = spectral_embedding(inside_BCHW, 3)
    (inside[0].sum() + (inside[1] ** 3).sum()).backward()
    assert inside[0].dtype == inside[1].dtype == torch.float32
    assert torch.equal(inside[0], outside[0])
    assert torch.equal(inside[1], outside[1])
    assert torch.equal(inside_BCHW.grad, outside_BCHW.grad)


def test_deflated_factor_equals_the_plain_one_in_values_and_gradients():
    for weights, shape in itertools.product(WEIGHTS, SHAPES):
        fast_BCHW = maps_for(weights, shape).requires_grad_()
        plain_BCHW = fast_BCHW.detach().clone().requires_grad_()
        factor_BCK, trivial_BC = normalised_factor(plain_BCHW, weights)
        plain_BCK = factor_BCK - trivial_BC[:, :, None] * (trivial_BC[:, None, :] @ factor_BCK)
        fast_BCK = deflated_factor(fast_BCHW, weights)
        torch.testing.assert_close(fast_BCK, plain_BCK)
        probe_BCK = torch.sin(torch.arange(plain_BCK.numel())).reshape(plain_BCK.shape)
        (fast_BCK * probe_BCK).sum().backward()
        (plain_BCK * probe_BCK).sum().backward()
        torch.testing.assert_close(fast_BCHW.grad, plain_BCHW.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [2, 4])
def test_eigendecomposition_passes_gradcheck(count: int):
    factor_BPK = positive_maps(2, 4, 6).requires_grad_()
    assert gradcheck(lambda factor: leading_pairs(factor @ factor.mT, count), factor_BPK)


@pytest.mark.parametrize("gap", [1e-3, 1e-5])
def test_gradient_of_the_eigendecomposition_is_exact_at_small_gaps(gap: float):
    basis_PP = torch.linalg.qr(positive_maps(4, 4)).Q
    values_P = torch.tensor([1.0, 0.5 + gap, 0.5, 0.1], dtype=torch.float64)
    factor_BPK = (basis_PP * values_P.sqrt())[None].requires_grad_()
    vectors_BPd = leading_pairs(factor_BPK @ factor_BPK.mT, 3)[1]
    reference_BPP = torch.linalg.eigh(factor_BPK @ factor_BPK.mT)[1].flip(2)
    probe_Pd = positive_maps(4, 3, seed=1)
    basis_Pd = basis_PP[:, :3]
    (fast,) = torch.autograd.grad((same_signs(vectors_BPd, basis_Pd) * probe_Pd).sum(), factor_BPK)
    (exact,) = torch.autograd.grad(
        (same_signs(reference_BPP[:, :, :3], basis_Pd) * probe_Pd).sum(), factor_BPK
    )
    assert (fast - exact).norm() < 1e-8 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_the_eigendecomposition_is_bounded_at_repeated_eigenvalues(
    dtype: torch.dtype,
):
    bound = torch.finfo(dtype).eps ** -0.5
    for matrix_PP in (torch.eye(4), torch.ones(4, 4), torch.zeros(4, 4)):
        factor_BPK = matrix_PP.to(dtype)[None].requires_grad_()
        values_BP, vectors_BPP = leading_pairs(factor_BPK @ factor_BPK.mT, 4)
        (values_BP.sum() + (vectors_BPP * positive_maps(4, 4, dtype=dtype)).sum()).backward()
        assert factor_BPK.grad.abs().max() < 10 * bound
