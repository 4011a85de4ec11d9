"""The spectral embedding, compared with a full decomposition of the dense Laplacian.

Shape letters: B batch, C channels, H height, W width, d spectral dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from raygkd.accelerated import FAST
from raygkd.bench.rows import Row, Rows
from raygkd.engine.measure import interleaved
from raygkd.graph import ChannelGraphs, adjacency

DIM = 8
# B, C, H and W, from a small side of C to one of N + 1
SHAPES = ((64, 64, 8, 8), (64, 256, 8, 8), (32, 512, 4, 4), (8, 256, 32, 32), (8, 2048, 7, 7))
QUICK_SHAPES = ((64, 64, 8, 8), (8, 256, 32, 32), (2, 2048, 7, 7))
# from this many channels, and up to this many positions, the target is a factor of 100
MANY_CHANNELS, FEW_POSITIONS = 2048, 49


def fast_embedding(features_BCHW: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return ``spectral_embedding`` as the losses compute it."""
    return ChannelGraphs(features_BCHW, operators=FAST).embedding(dim)


def dense_embedding(features_BCHW: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return ``spectral_embedding``, computed from the normalised Laplacian (B, C, C)."""
    weights_BCC = (1 + adjacency(features_BCHW)) / 2
    root_BC = weights_BCC.sum(2).rsqrt()
    normalised_BCC = weights_BCC * root_BC[:, :, None] * root_BC[:, None, :]
    laplacian_BCC = torch.eye(len(root_BC[0]), device=root_BC.device) - normalised_BCC
    values_BC, vectors_BCC = torch.linalg.eigh(laplacian_BCC)
    return 1 - values_BC[:, 1 : dim + 1], vectors_BCC[:, :, 1 : dim + 1]


def spectral_rows(device: torch.device, *, quick: bool) -> Rows:
    """Yield a row for each shape: forward and backward, float32."""
    for shape in QUICK_SHAPES if quick else SHAPES:
        # the dense decomposition takes seconds for many channels
        yield _row(shape, device, repeats=1 if quick and shape[1] >= MANY_CHANNELS else 5)


def _row(shape: tuple[int, ...], device: torch.device, repeats: int) -> Row:
    generator = torch.Generator().manual_seed(0)
    features_BCHW = torch.rand(shape, generator=generator).to(device).requires_grad_()
    sides = {"ours": fast_embedding, "dense": dense_embedding}
    timings = interleaved(
        {name: _there_and_back(side, features_BCHW) for name, side in sides.items()},
        repeats,
        min_seconds=0.1,
    )
    batch, channels, height, width = shape
    positions = height * width
    is_large = channels >= MANY_CHANNELS and positions <= FEW_POSITIONS
    return Row(
        what=f"spectral embedding {batch} x {channels} x {positions}, forward and backward",
        against="dense Laplacian, eigh",
        value=timings.ratio("dense", "ours"),
        unit="x",
        # never slower than 1.1 times
        bound=100.0 if is_large else 1 / 1.1,
        at_least=True,
        configuration={"dim": DIM, "dtype": "float32", "seconds": timings.medians},
    )


def _there_and_back(
    embedding: Callable[[Tensor, int], tuple[Tensor, Tensor]], features_BCHW: Tensor
) -> Callable[[], None]:
    def run() -> None:
        values_Bd, vectors_BCd = embedding(features_BCHW, DIM)
        # squares: the same for either sign of a vector
        loss = (vectors_BCd.square() * values_Bd[:, None, :]).square().sum()
        torch.autograd.grad(loss, features_BCHW)

    return run
