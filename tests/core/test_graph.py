"""The channels relational graph and its attention.

Shape letters: B batch, C channels, H height, W width, N = H * W positions.
"""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from raygkd.errors import ConfigError
from raygkd.graph import (
    adjacency,
    attention_masks,
    centred,
    full_precision,
    normalised_channels,
    relational_attention,
)


def random_maps(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def test_adjacency_is_the_cosine_of_the_flattened_maps():
    features_BCHW = random_maps(2, 5, 3, 4)
    flat_BCN = features_BCHW.flatten(2)
    expected = torch.cosine_similarity(flat_BCN[:, :, None], flat_BCN[:, None, :], dim=3)
    torch.testing.assert_close(adjacency(features_BCHW), expected)


def test_adjacency_passes_gradcheck():
    assert gradcheck(adjacency, random_maps(2, 3, 2, 2).requires_grad_())


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_adjacency_does_not_depend_on_the_scale_of_the_features(scale: float):
    features_BCHW = random_maps(1, 4, 2, 2, dtype=torch.float32)
    torch.testing.assert_close(adjacency(features_BCHW * scale), adjacency(features_BCHW))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 0.5])
def test_dead_channel_has_zero_row_and_zero_gradient(dtype: torch.dtype, size: float):
    features_BCHW = random_maps(2, 4, 3, 3, dtype=dtype)
    norm = features_BCHW.flatten(2).norm(dim=2).max()
    features_BCHW[:, 1] = size * torch.finfo(dtype).eps * norm / 9
    features_BCHW.requires_grad_()
    (adjacency(features_BCHW) * random_maps(2, 4, 4, dtype=dtype)).sum().backward()
    assert (normalised_channels(features_BCHW)[:, 1] == 0).all()
    assert (features_BCHW.grad[:, 1] == 0).all()
    assert (features_BCHW.grad[:, 0] != 0).all()


def test_dead_channel_leaves_the_gradient_of_the_others_exact():
    features_BCHW = random_maps(1, 3, 2, 2).requires_grad_()
    dead_BCHW = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    assert gradcheck(lambda maps: adjacency(torch.cat([maps, dead_BCHW], 1)), features_BCHW)


def test_all_zero_maps_give_zero_adjacency_and_zero_gradient():
    features_BCHW = torch.zeros(2, 3, 2, 2, requires_grad=True)
    adjacency(features_BCHW).sum().backward()
    assert (adjacency(features_BCHW) == 0).all()
    assert (features_BCHW.grad == 0).all()


def test_nan_is_not_taken_for_a_dead_channel():
    features_BCHW = random_maps(1, 3, 2, 2)
    features_BCHW[0, 1, 0, 0] = float("nan")
    assert adjacency(features_BCHW).isnan().any()


def test_centred_channels_have_no_mean_and_their_cosines_are_correlations():
    features_BCHW = random_maps(2, 5, 3, 4) + 7
    centred_BCHW = centred(features_BCHW)
    torch.testing.assert_close(centred_BCHW.mean((2, 3)), torch.zeros(2, 5).double())
    expected = torch.stack([torch.corrcoef(one) for one in features_BCHW.flatten(2)])
    torch.testing.assert_close(adjacency(centred_BCHW), expected)
    shift_BC11 = random_maps(2, 5, 1, 1)
    torch.testing.assert_close(centred(features_BCHW + shift_BC11), centred_BCHW)
    assert gradcheck(centred, random_maps(1, 2, 2, 2).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_a_constant_channel_is_dead_when_it_is_centred(dtype: torch.dtype, value: float):
    features_BCHW = random_maps(1, 3, 5, 7, dtype=dtype)
    features_BCHW[:, 1] = value
    features_BCHW.requires_grad_()
    centred_BCHW = centred(features_BCHW)
    assert centred_BCHW[:, 1].eq(0).all()
    assert centred_BCHW[:, 0].ne(0).all()
    adjacency(centred_BCHW).square().sum().backward()
    assert features_BCHW.grad is not None
    assert features_BCHW.grad[:, 1].eq(0).all()
    assert features_BCHW.grad.isfinite().all()
    assert centred(torch.full((1, 1, 2, 2), torch.nan)).isnan().all()


def test_attention_masks_follow_their_formula_and_average_to_one():
    features_BCHW = random_maps(2, 5, 3, 4)
    spatial_B1HW, channel_BC = attention_masks(features_BCHW, 0.5)
    power_BHW = (features_BCHW.abs().mean(1) / 0.5).exp()
    power_BC = (features_BCHW.abs().mean((2, 3)) / 0.5).exp()
    expected_BHW = power_BHW / power_BHW.mean((1, 2), keepdim=True)
    torch.testing.assert_close(spatial_B1HW, expected_BHW[:, None])
    torch.testing.assert_close(channel_BC, power_BC / power_BC.mean(1, keepdim=True))


def test_relational_attention_follows_its_formulas_and_averages_to_one():
    features_BCHW = random_maps(2, 5, 3, 4)
    _, channel_BC = attention_masks(features_BCHW, 0.5)
    outer_BCC = relational_attention(features_BCHW, 0.5, "outer")
    softmax_BCC = relational_attention(features_BCHW, 0.5, "softmax")
    torch.testing.assert_close(outer_BCC, torch.einsum("bi,bj->bij", channel_BC, channel_BC))
    power_BCC = (adjacency(features_BCHW).abs() / 0.5).exp()
    torch.testing.assert_close(softmax_BCC, power_BCC / power_BCC.mean(2, keepdim=True))
    for weights_BCC in (outer_BCC, softmax_BCC):
        torch.testing.assert_close(weights_BCC.mean((1, 2)), torch.ones(2, dtype=torch.float64))


def test_attention_has_no_gradient():
    features_BCHW = random_maps(1, 3, 2, 2).requires_grad_()
    spatial_B1HW, channel_BC = attention_masks(features_BCHW, 0.5)
    assert not spatial_B1HW.requires_grad
    assert not channel_BC.requires_grad
    assert not relational_attention(features_BCHW, 0.5, "softmax").requires_grad


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_attention_refuses_a_temperature_that_is_not_positive(temperature: float):
    with pytest.raises(ConfigError, match="temperature must be a finite number above 0"):
        attention_masks(random_maps(1, 3, 2, 2), temperature)


def test_unknown_attention_mode_names_the_near_and_the_allowed_ones():
    with pytest.raises(ConfigError, match=r"'softmaks'.*'softmax'.*allowed: outer, softmax"):
        relational_attention(random_maps(1, 3, 2, 2), 0.5, "softmaks")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_computed_in_float32(dtype: torch.dtype):
    features_BCHW = random_maps(2, 5, 3, 4).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adjacency_BCC = adjacency(features_BCHW)
    assert adjacency_BCC.dtype == torch.float32
    torch.testing.assert_close(adjacency_BCC, adjacency(features_BCHW.float()), rtol=0, atol=0)


def test_full_precision_casts_all_tensors_to_one_type():
    @full_precision
    def product(left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    half, double = torch.ones(2, 2, dtype=torch.float16), torch.ones(2, 2, dtype=torch.float64)
    assert product(half, right=double).dtype == torch.float64
    assert product(half, right=half).dtype == torch.float32
