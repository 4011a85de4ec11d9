"""Distillation of a detector's feature pyramid: FGD, CWD and PKD.

Shape letters: B batch, C channels, H height, W width, N = H * W positions, M boxes of an image.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raygkd.errors import ConfigError
from raygkd.graph import (
    attention_masks,
    full_precision,
    require,
    shape_problem,
    softmax_masks,
    temperature_problem,
    weight_problems,
)
from raygkd.losses.base import AlignedLoss, Setup
from raygkd.registry import METHODS, option

# added by PKD to a channel's standard deviation, in units of the features
DEVIATION = 1e-6


@full_precision
def cwd_loss(student_BCHW: Tensor, teacher_BCHW: Tensor, tau: float) -> Tensor:
    """Return ``tau^2 KL(p_t || p_s)`` of each channel's map, averaged over channels and samples.

    ``p`` is the softmax over the positions of a channel's map divided by tau.

    Args:
        student_BCHW: feature maps (B, C, H, W), already of the teacher's shape.
        teacher_BCHW: feature maps (B, C, H, W); they get no gradient.
        tau: temperature, above 0, in units of the features.

    Returns:
        A scalar in nats times tau^2.

    Raises:
        ConfigError: the shapes differ, or tau is not above 0.

    Source: Shu et al., arXiv 2011.13256.
    """
    require(
        shape_problem("feature maps", student_BCHW, teacher_BCHW), temperature_problem(tau, "tau")
    )
    student_BCN = (student_BCHW.flatten(2) / tau).log_softmax(2)
    teacher_BCN = (teacher_BCHW.detach().flatten(2) / tau).log_softmax(2)
    divergence_BCN = F.kl_div(student_BCN, teacher_BCN, reduction="none", log_target=True)
    return tau**2 * divergence_BCN.sum(2).mean()


@full_precision
def pkd_loss(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Return half the mean squared difference of maps that are standardised per channel.

    A channel's mean and standard deviation (with n - 1) are taken over its n positions in all
    samples. The loss is thus ``(n - 1) / n`` times 1 minus the Pearson correlation, averaged over
    channels. A constant channel becomes 0, as does every channel if n is 1.

    Args:
        student_BCHW: feature maps (B, C, H, W), already of the teacher's shape.
        teacher_BCHW: feature maps (B, C, H, W); they get no gradient.

    Returns:
        A scalar without unit, from 0 to 2.

    Raises:
        ConfigError: the shapes differ.

    Source: Cao et al., arXiv 2207.02039.
    """
    require(shape_problem("feature maps", student_BCHW, teacher_BCHW))
    return F.mse_loss(_standardised(student_BCHW), _standardised(teacher_BCHW.detach())) / 2


def _standardised(features_BCHW: Tensor) -> Tensor:
    """Subtract each channel's mean over the batch and divide by its standard deviation."""
    dims = (0, 2, 3)
    samples = features_BCHW.numel() // features_BCHW.shape[1]
    deviation_1C11 = features_BCHW.std(dims, correction=min(1, samples - 1), keepdim=True)
    return (features_BCHW - features_BCHW.mean(dims, keepdim=True)) / (deviation_1C11 + DEVIATION)


@torch.no_grad()
def focal_masks(
    boxes: Sequence[Tensor], canvas: int, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return position weights for objects and for background.

    In units of grid cells, a box covers the cells from floor(x0) to ceil(x1) inclusive, and
    likewise for y. As in the authors' code, that can be one cell more than the box touches. Each
    covered cell has the inverse of their number as its weight, even if some of the cells lie
    outside the grid; where boxes overlap, the largest weight counts. The cells that no box covers
    share a total weight of 1 equally.

    Args:
        boxes: (M, 4) for each image, as x0, y0, x1, y1 in pixels of the canvas; M may be 0.
        canvas: side in pixels of the model's square input.
        grid: H and W of the feature map that covers the canvas.

    Returns:
        objects (B, H, W) and background (B, H, W), float32 on the device of the boxes.

    Source: Yang et al., arXiv 2111.11837.
    """
    objects_BHW = torch.stack([_object_weights(boxes_M4, canvas, grid) for boxes_M4 in boxes])
    background_BHW = (objects_BHW == 0).float()
    cells_B11 = background_BHW.sum((1, 2), keepdim=True)
    return objects_BHW, background_BHW / cells_B11.clamp_min(1)


def _object_weights(boxes_M4: Tensor, canvas: int, grid: tuple[int, int]) -> Tensor:
    """Return the position weights (H, W) for the objects of one image."""
    height, width = grid
    cells_M4 = boxes_M4.float() / canvas * boxes_M4.new_tensor([width, height, width, height])
    left_M, top_M = cells_M4[:, :2].floor().unbind(1)
    right_M, bottom_M = cells_M4[:, 2:].ceil().unbind(1)
    inside_MHW = (
        _between(top_M, bottom_M, height)[:, :, None] & _between(left_M, right_M, width)[:, None, :]
    )
    weight_M = 1 / ((bottom_M - top_M + 1) * (right_M - left_M + 1))
    weights_MHW = inside_MHW * weight_M[:, None, None]
    return torch.cat([weights_MHW.new_zeros(1, height, width), weights_MHW]).amax(0)


def _between(first_M: Tensor, last_M: Tensor, cells: int) -> Tensor:
    """Return a mask (M, cells) of the cells along an axis from first to last, inclusive."""
    index = torch.arange(cells, device=first_M.device)
    return (first_M[:, None] <= index) & (index <= last_M[:, None])


@full_precision
def focal_loss(
    student_BCHW: Tensor, teacher_BCHW: Tensor, mask_BHW: Tensor, temperature: float
) -> Tensor:
    """Return ``sum m a_S a_C (F_t - F_s)^2`` over channels and positions, averaged over samples.

    Args:
        student_BCHW: feature maps (B, C, H, W), already of the teacher's shape.
        teacher_BCHW: feature maps (B, C, H, W); they get no gradient.
        mask_BHW: m, position weights (B, H, W), see ``focal_masks``.
        temperature: T > 0 of the teacher's ``attention_masks`` a_S and a_C.

    Returns:
        A scalar in squared units of the features.

    Raises:
        ConfigError: the maps differ in shape.

    Source: Yang et al., arXiv 2111.11837.
    """
    if student_BCHW.shape != teacher_BCHW.shape:
        require(
            "maps of student and teacher must have the same shape; got "
            f"{tuple(student_BCHW.shape)} and {tuple(teacher_BCHW.shape)}"
        )
    teacher_BCHW = teacher_BCHW.detach()
    spatial_B1HW, channel_BC = attention_masks(teacher_BCHW, temperature)
    weights_BCHW = mask_BHW[:, None] * spatial_B1HW * channel_BC[:, :, None, None]
    return (weights_BCHW * (teacher_BCHW - student_BCHW).square()).sum((1, 2, 3)).mean()


@full_precision
def attention_loss(student_BCHW: Tensor, teacher_BCHW: Tensor, temperature: float) -> Tensor:
    """Return the summed absolute difference of both attention masks, averaged over samples.

    Args:
        student_BCHW: feature maps (B, C, H, W), already of the teacher's shape.
        teacher_BCHW: feature maps (B, C, H, W); they get no gradient.
        temperature: T > 0 of the ``softmax_masks``.

    Returns:
        A scalar without unit.

    Source: Yang et al., arXiv 2111.11837.
    """
    spatial_s, channel_s = softmax_masks(student_BCHW, temperature)
    spatial_t, channel_t = attention_masks(teacher_BCHW, temperature)
    spatial_difference_B = (spatial_s - spatial_t).abs().sum((1, 2, 3))
    return (spatial_difference_B + (channel_s - channel_t).abs().sum(1)).mean()


class GlobalContext(nn.Module):
    """Adds global context to a map: the block of GCNet (arXiv 1904.11492).

    A softmax over the positions pools them into one vector of C, which passes a bottleneck of C / 2
    and is added at every position. The last layer starts at zero, so the block starts as the
    identity.
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(1, channels // 2)
        last = nn.Conv2d(hidden, channels, kernel_size=1)
        # a bias would cancel in the softmax
        self.attention = nn.Conv2d(channels, 1, kernel_size=1, bias=False)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, hidden, kernel_size=1),
            nn.LayerNorm([hidden, 1, 1]),
            nn.ReLU(),
            last,
        )
        nn.init.kaiming_normal_(self.attention.weight, nonlinearity="relu")
        assert last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Return maps of the same shape."""
        weights_B1N = self.attention(features_BCHW).flatten(2).softmax(2)
        context_BC1 = features_BCHW.flatten(2) @ weights_B1N.mT
        return features_BCHW + self.transform(context_BC1[..., None])


class PyramidLoss(AlignedLoss, ABC):
    """A loss of pyramids; if the channels differ, a 1x1 convolution adapts the student's.

    Attributes:
        bias: whether the convolution has a bias, which cancels in losses that centre maps.
    """

    task = "detection"
    bias: ClassVar[bool] = False

    def adapter(self, student_channels: int, teacher_channels: int) -> nn.Module:
        """Return a convolution, or the identity."""
        if student_channels == teacher_channels:
            return nn.Identity()
        return nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=self.bias)


@METHODS.register("cwd")
class CWD(PyramidLoss):
    """Spatial distribution of each channel, see ``cwd_loss``.

    Raises:
        ConfigError: tau is not above 0.
    """

    weight = 10.0
    source = "Shu et al., ICCV 2021, arXiv 2011.13256; constants of the mmrazor repository"

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of the loss."""

        tau: float = option(1.0, "temperature of the channel maps", above=0.0)

    def __init__(self, setup: Setup, *, tau: float):
        super().__init__(setup)
        require(temperature_problem(tau, "tau"))
        self.tau = tau

    def level_loss(self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Return ``cwd_loss``."""
        return cwd_loss(*self.aligned(level, student_BCHW, teacher_BCHW), self.tau)


@METHODS.register("pkd")
class PKD(PyramidLoss):
    """Correlation between the maps, see ``pkd_loss``."""

    weight = 10.0
    two_stage_weight = 6.0
    source = "Cao et al., NeurIPS 2022, arXiv 2207.02039; constants of the mmrazor repository"

    def level_loss(self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Return ``pkd_loss``."""
        return pkd_loss(*self.aligned(level, student_BCHW, teacher_BCHW))


@METHODS.register("fgd")
class FGD(PyramidLoss):
    """Focal and global distillation: objects, background, attention and relations.

    Args:
        setup: what it is built for; it needs the shapes and the canvas.
        temperature: T > 0 of the attention masks.
        foreground: weight (the paper's alpha) of ``focal_loss`` on the objects.
        background: weight (beta) of ``focal_loss`` on the background.
        attention: weight (gamma) of ``attention_loss``.
        relation: weight (lambda) of the summed squared difference of both maps, each passed through
            a ``GlobalContext``, averaged over samples. Both blocks are trained with the student.

    Raises:
        ConfigError: the shapes or the canvas are missing, or a setting is invalid.

    Source: Yang et al., arXiv 2111.11837.
    """

    weight = 1.0
    two_stage_settings: ClassVar[Mapping[str, float]] = {
        "foreground": 5e-5,
        "background": 2.5e-5,
        "attention": 5e-5,
        "relation": 5e-7,
    }
    source = (
        "Yang et al., CVPR 2022, arXiv 2111.11837; RetinaNet and Faster R-CNN of its repository"
    )

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of the loss; two-stage detectors have others by default."""

        temperature: float = option(0.5, "temperature of the attention masks", above=0.0)
        foreground: float = option(
            1e-3, "weight of foreground features [default: 0.001, two-stage 5e-05]", minimum=0.0
        )
        background: float = option(
            5e-4, "weight of background features [default: 0.0005, two-stage 2.5e-05]", minimum=0.0
        )
        attention: float = option(
            5e-4, "weight of the attention loss [default: 0.0005, two-stage 5e-05]", minimum=0.0
        )
        relation: float = option(
            5e-6, "weight of the relation loss [default: 5e-06, two-stage 5e-07]", minimum=0.0
        )

    needs = ("student_features", "teacher_features", "boxes")
    bias = True

    def __init__(
        self,
        setup: Setup,
        *,
        temperature: float,
        foreground: float,
        background: float,
        attention: float,
        relation: float,
    ):
        super().__init__(setup)
        self.weights = {
            "foreground": foreground,
            "background": background,
            "attention": attention,
            "relation": relation,
        }
        require(temperature_problem(temperature), *weight_problems(**self.weights))
        if setup.canvas is None:
            raise ConfigError(f"{self.name} needs canvas, the side of the images in pixels")
        self.require_shapes("each level has blocks of its own")
        self.temperature, self.canvas = temperature, setup.canvas
        channels = {level: self.teacher_shapes[int(level)][0] for level in self.adapters}
        self.student_context = nn.ModuleDict({k: GlobalContext(c) for k, c in channels.items()})
        self.teacher_context = nn.ModuleDict({k: GlobalContext(c) for k, c in channels.items()})

    def level_loss(
        self,
        level: int,
        student_BCHW: Tensor,
        teacher_BCHW: Tensor,
        boxes: Sequence[Tensor],
    ) -> Tensor:
        """Return the weighted sum of the four terms."""
        student_BCHW, teacher_BCHW = self.aligned(level, student_BCHW, teacher_BCHW)
        maps = student_BCHW, teacher_BCHW
        _, _, height, width = teacher_BCHW.shape
        objects_BHW, background_BHW = focal_masks(boxes, self.canvas, (height, width))
        student_context_BCHW = self.student_context[str(level)](student_BCHW)
        teacher_context_BCHW = self.teacher_context[str(level)](teacher_BCHW)
        terms = {
            "foreground": focal_loss(*maps, objects_BHW, self.temperature),
            "background": focal_loss(*maps, background_BHW, self.temperature),
            "attention": attention_loss(*maps, self.temperature),
            "relation": (student_context_BCHW - teacher_context_BCHW)
            .square()
            .sum((1, 2, 3))
            .mean(),
        }
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
