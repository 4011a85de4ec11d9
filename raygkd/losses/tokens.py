"""Distillation of a graph whose vertices are tokens: positions of the maps of a batch.

[paper] (arXiv 2306.12442): tokens as vertices, relations inside an image and across images, and a
contextual term for the inside of an image. [ours]: how tokens are drawn, the softmax of cosines
as relations, both formulas, their temperature and weights.

Shape letters: B batch, C channels, H height, W width, N = H * W positions, M drawn tokens of an
image, V = B * M vertices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from raygkd.graph import full_precision, normalised_channels, require, temperature_problem
from raygkd.losses.base import FeatureLoss, Setup
from raygkd.losses.levels import on_one_grid, without_gradient
from raygkd.registry import METHODS, option

# similarity of a token to itself: its share of the softmax is exactly 0, unless it is alone
ITSELF = -1e4


def drawn_positions(images: int, positions: int, tokens: int) -> Tensor | None:
    """Draw positions of each image, without repetition, from torch's generator of the CPU.

    Args:
        images: B.
        positions: N of each image.
        tokens: about how many to draw from the whole batch; at least one of each image is drawn.

    Returns:
        (B, M) indices of positions, or None if all positions are taken.
    """
    drawn = max(1, tokens // images)
    if drawn >= positions:
        return None
    return torch.rand(images, positions).argsort(1)[:, :drawn]


@full_precision
def token_graph_loss(
    student_BCHW: Tensor,
    teacher_BCHW: Tensor,
    temperature: float,
    positions_BM: Tensor | None = None,
    context: float = 1.0,
) -> Tensor:
    """Return the divergence of the relations of tokens, plus that of their contexts.

    A token is the vector (C) of a position, divided by its Euclidean norm. The relations of a
    drawn token are the softmax of its cosines, divided by T, to all other drawn tokens of the
    batch, those of its own image among them. Its context is the same of all other positions of
    its own image. Each part is ``KL(p_t || p_s)``, averaged over the drawn tokens.

    Args:
        student_BCHW: feature maps (B, C_s, H, W).
        teacher_BCHW: feature maps (B, C_t, H, W); they get no gradient.
        temperature: T > 0.
        positions_BM: drawn positions of each image, for student and teacher alike; None for all.
            The cosines take memory of V^2 + V N.
        context: weight of the contexts; 0 leaves them out.

    Returns:
        A scalar in nats; 0 for a batch of one token.

    Raises:
        ConfigError: the temperature is not above 0.

    Source: Zhang et al., arXiv 2306.12442, for what is compared; the formulas are [ours].
    """
    require(temperature_problem(temperature))
    if positions_BM is None:
        everything_N = torch.arange(student_BCHW.shape[2] * student_BCHW.shape[3])
        positions_BM = everything_N.expand(len(student_BCHW), -1)
    positions_BM = positions_BM.to(student_BCHW.device)
    student_BNC, teacher_BNC = _tokens(student_BCHW), _tokens(without_gradient(teacher_BCHW))
    student_BMC, teacher_BMC = (
        tokens_BNC.take_along_dim(positions_BM[..., None], 1)
        for tokens_BNC in (student_BNC, teacher_BNC)
    )
    of_vertices_V1 = torch.arange(positions_BM.numel(), device=student_BCHW.device)[:, None]
    student_VV, teacher_VV = (
        _relations(tokens_BMC.flatten(0, 1), tokens_BMC.flatten(0, 1), of_vertices_V1, temperature)
        for tokens_BMC in (student_BMC, teacher_BMC)
    )
    loss = _divergence(student_VV, teacher_VV)
    if context:
        student_BMN, teacher_BMN = (
            _relations(drawn_BMC, tokens_BNC, positions_BM[..., None], temperature)
            for drawn_BMC, tokens_BNC in ((student_BMC, student_BNC), (teacher_BMC, teacher_BNC))
        )
        loss = loss + context * _divergence(student_BMN.flatten(0, 1), teacher_BMN.flatten(0, 1))
    return loss


def _tokens(features_BCHW: Tensor) -> Tensor:
    """Return the tokens (B, N, C) of unit length; one of zeros stays so, without gradient."""
    return normalised_channels(features_BCHW.flatten(2).mT[..., None])


def _relations(drawn: Tensor, others: Tensor, own: Tensor, temperature: float) -> Tensor:
    """Return the logarithms of tokens' relations to others (..., M, N).

    Args:
        drawn: tokens (..., M, C).
        others: tokens (..., N, C).
        own: index of each token among the others (..., M, 1).
        temperature: T.
    """
    scores = drawn @ others.mT / temperature
    return scores.scatter(-1, own, ITSELF).log_softmax(-1)


def _divergence(student_VN: Tensor, teacher_VN: Tensor) -> Tensor:
    """Return the divergence of rows of logarithms, averaged over rows."""
    return F.kl_div(student_VN, teacher_VN, reduction="batchmean", log_target=True)


@METHODS.register("trg")
class TRG(FeatureLoss):
    """The graph of the tokens of a batch, see ``token_graph_loss``.

    The finer of the two maps is average-pooled to the grid of the coarser one; channels may
    differ. Tokens are drawn anew in each batch. The authors' divergence of logits, which stands
    beside their graph, is left out.

    Args:
        setup: what it is built for.
        tokens: about how many tokens of a batch are drawn, at least one of each image.
        temperature: of the relations and contexts.
        context: weight of the contexts beside the relations.

    Raises:
        ConfigError: the temperature is not above 0.
    """

    weight = 1.0
    # the published weight is unknown
    baseline_share = 1.0
    levels = "last"
    source = "Zhang et al., arXiv 2306.12442; formulas, temperature and weights are ours"

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of the loss."""

        tokens: int = option(
            1024, "positions drawn from a batch, at least one of each image", minimum=1
        )
        temperature: float = option(
            0.1, "temperature of the similarities", above=0.0, search={"loguniform": (0.03, 1.0)}
        )
        context: float = option(
            1.0,
            "weight of the similarities inside an image",
            minimum=0.0,
            search={"loguniform": (0.1, 10.0)},
        )

    def __init__(self, setup: Setup, *, tokens: int, temperature: float, context: float):
        super().__init__(setup)
        require(temperature_problem(temperature))
        self.tokens, self.temperature, self.context = tokens, temperature, context

    def level_loss(self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Return ``token_graph_loss``."""
        student_BCHW, teacher_BCHW = on_one_grid(student_BCHW, teacher_BCHW)
        images, _, height, width = student_BCHW.shape
        positions_BM = drawn_positions(images, height * width, self.tokens)
        return token_graph_loss(
            student_BCHW, teacher_BCHW, self.temperature, positions_BM, self.context
        )
