"""Channel graphs side by side: means over images, the order of the channels, the rotation.

Shape letters: B batch, C channels, H height, W width, d spectral dimension.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from raygkd.graph import WEIGHTS, adjacency, normalised_factor
from raygkd.report.graph_numbers import fiedler_order, graph_views, joined_maps, turned

SEEDS = st.integers(0, 2**31)


def maps(seed: int, *shape: int) -> Tensor:
    """Return positive float64 maps, as a ReLU gives them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def two_kinds(seed: int) -> tuple[Tensor, Tensor]:
    """Return maps (3, 12, 4, 4) of two kinds of channels, mixed, and the kind of each (12,)."""
    patterns_2HW = maps(seed, 2, 4, 4)
    kind_C = torch.randperm(12, generator=torch.Generator().manual_seed(seed)) % 2
    return patterns_2HW[kind_C][None] + 0.05 * maps(seed + 1, 3, 12, 4, 4), kind_C


def test_the_joined_graph_is_the_mean_of_the_images_graphs() -> None:
    maps_BCHW = maps(0, 5, 7, 3, 4)
    mean_CC = adjacency(maps_BCHW).mean(0)
    torch.testing.assert_close(adjacency(joined_maps(maps_BCHW))[0], mean_CC, rtol=0, atol=1e-12)


def test_a_channel_that_is_dead_in_one_image_has_its_cosines_from_the_others() -> None:
    maps_BCHW = maps(0, 2, 4, 3, 3)
    maps_BCHW[0, 2] = 0
    joined_CC = adjacency(joined_maps(maps_BCHW))[0]
    assert joined_CC[2, 2].item() == pytest.approx(1)
    torch.testing.assert_close(
        joined_CC[2, 0], adjacency(maps_BCHW)[1, 2, 0] / 2**0.5, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("seed", range(5))
def test_channels_of_a_kind_stand_together(weights: str, seed: int) -> None:
    maps_BCHW, kind_C = two_kinds(seed)
    kinds = kind_C[fiedler_order(joined_maps(maps_BCHW), weights)].tolist()
    assert kinds in ([0] * 6 + [1] * 6, [1] * 6 + [0] * 6)


@given(SEEDS)
def test_the_order_goes_with_the_channels(seed: int) -> None:
    maps_BCHW = maps(seed, 2, 9, 3, 3)
    shuffled_C = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    order_C = fiedler_order(joined_maps(maps_BCHW), "shifted")
    again_C = shuffled_C[fiedler_order(joined_maps(maps_BCHW[:, shuffled_C]), "shifted")]
    assert again_C.tolist() == order_C.tolist()


def test_the_order_is_that_of_the_laplacians_second_eigenvector() -> None:
    joined_1CBN = joined_maps(maps(3, 2, 8, 3, 3))
    factor_CK = normalised_factor(joined_1CBN)[0][0].numpy()
    laplacian = np.eye(8) - factor_CK @ factor_CK.T
    vector = np.linalg.eigh(laplacian)[1][:, 1]
    order = fiedler_order(joined_1CBN, "shifted").tolist()
    assert order in (np.argsort(vector).tolist(), np.argsort(-vector).tolist())


@given(SEEDS, st.booleans())
def test_a_turned_embedding_is_turned_back(seed: int, mirrored: bool) -> None:
    to_Cd = maps(seed, 10, 2) - 0.5
    angle = torch.tensor(seed % 360, dtype=torch.float64).deg2rad()
    turn_dd = torch.stack(
        [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
    )
    if mirrored:
        turn_dd = turn_dd * torch.tensor([1.0, -1.0])
    torch.testing.assert_close(turned(to_Cd @ turn_dd, to_Cd), to_Cd, rtol=0, atol=1e-12)


@given(SEEDS)
def test_the_rotation_is_the_best_one_and_leaves_lengths(seed: int) -> None:
    places_Cd, to_Cd = maps(seed, 10, 2) - 0.5, maps(seed + 1, 10, 2) - 0.5
    found_Cd = turned(places_Cd, to_Cd)
    best, _ = orthogonal_procrustes(places_Cd.numpy(), to_Cd.numpy())
    np.testing.assert_allclose(found_Cd.numpy(), places_Cd.numpy() @ best, atol=1e-12)
    torch.testing.assert_close(found_Cd.norm(dim=1), places_Cd.norm(dim=1))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_student_with_the_teachers_graph_differs_in_nothing(weights: str) -> None:
    teacher_BCHW = maps(0, 4, 9, 3, 3)
    scaled_BCHW = teacher_BCHW * torch.linspace(1, 5, 9, dtype=torch.float64)[:, None, None]
    other_BCHW = maps(1, 4, 9, 3, 3)
    views = graph_views(
        teacher_BCHW, {"same": scaled_BCHW, "other": other_BCHW}, dim=3, weights=weights
    )
    same, other, teacher = views["same"], views["other"], views["teacher"]
    assert same.edge_difference == pytest.approx(0, abs=1e-7)
    assert same.spectral_distance == pytest.approx(0, abs=1e-7)
    torch.testing.assert_close(same.embedding_C2, teacher.embedding_C2, rtol=0, atol=1e-7)
    assert other.edge_difference > 0.01
    assert other.spectral_distance > 0.1
    difference = adjacency(joined_maps(teacher_BCHW)) - adjacency(joined_maps(other_BCHW))
    assert other.edge_difference == pytest.approx(float(difference.square().mean().sqrt()))


def test_all_are_shown_in_the_teachers_order() -> None:
    teacher_BCHW, other_BCHW = maps(0, 2, 6, 3, 3), maps(1, 2, 6, 3, 3)
    order_C = fiedler_order(joined_maps(teacher_BCHW), "shifted")
    views = graph_views(teacher_BCHW, {"other": other_BCHW}, dim=2, weights="shifted")
    for view, of_BCHW in ((views["teacher"], teacher_BCHW), (views["other"], other_BCHW)):
        in_order_BCHW = of_BCHW[:, order_C]
        torch.testing.assert_close(
            view.adjacency_CC, adjacency(joined_maps(in_order_BCHW))[0], rtol=0, atol=1e-12
        )


def test_a_graph_of_two_channels_has_one_dimension() -> None:
    views = graph_views(
        maps(0, 2, 2, 3, 3), {"other": maps(1, 2, 2, 3, 3)}, dim=1, weights="shifted"
    )
    assert views["other"].embedding_C2.shape == (2, 2)
    assert torch.isfinite(views["other"].embedding_C2).all()
