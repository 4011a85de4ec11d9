"""Adapter from the student's channels to the teacher's: a 1x1 convolution, plain or normalised.

Shape letters: B batch, C channels of the student, O channels of the teacher, H height, W width,
N = H * W positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raygkd.graph import PLAIN, Operators, full_precision, require

ADAPTERS = ("plain", "normalised")


class Adapter(nn.Module):
    """A 1x1 convolution that starts as the identity, folded or repeated to fit.

    Each output channel starts as the mean of the input channels with the same index modulo the
    smaller width. The initial graph is therefore the student's own. Random signs would turn the
    non-negative maps after a ReLU into antipodal channels, unlike those of any teacher. A
    "normalised" adapter is followed by batch normalisation.

    Args:
        student_channels: number of input channels.
        teacher_channels: number of output channels.
        kind: "plain" or "normalised".
        operators: implementation of the statistics.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        kind: str = "plain",
        operators: Operators = PLAIN,
    ):
        super().__init__()
        self._operators = operators
        self.conv = nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False)
        self.norm = nn.BatchNorm2d(teacher_channels) if kind == "normalised" else None
        width = min(student_channels, teacher_channels)
        output_index = torch.arange(teacher_channels)[:, None] % width
        input_index = torch.arange(student_channels)[None, :] % width
        matches = (output_index == input_index).float()
        with torch.no_grad():
            self.conv.weight.copy_((matches / matches.sum(1, keepdim=True))[:, :, None, None])

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Return (B, O, H, W) of maps (B, C, H, W)."""
        return mixed(maps_BCHW, *self.mixing(maps_BCHW))

    @full_precision
    def mixing(
        self, maps_BCHW: Tensor, moments: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the weights (O, C) and the bias (O,) that mix the channels of a batch.

        The mean and variance that batch normalisation needs of the convolution's output follow from
        the mean and covariance of its input. So the output need not be in memory as a whole, and
        the images can be processed in parts.

        Args:
            maps_BCHW: the batch.
            moments: its ``channel_moments``, if already computed.

        Raises:
            ConfigError: batch normalisation of a single position of a single image in training.
        """
        dtype = torch.promote_types(self.conv.weight.dtype, maps_BCHW.dtype)
        weight_OC, maps_BCHW = self.conv.weight[:, :, 0, 0].to(dtype), maps_BCHW.to(dtype)
        if self.norm is None:
            return weight_OC, weight_OC.new_zeros(len(weight_OC))
        mean_O, variance_O = self._statistics(maps_BCHW, moments, weight_OC, self.norm)
        gain_O, bias_O = self.norm.weight.to(dtype), self.norm.bias.to(dtype)
        scale_O = gain_O * (variance_O + self.norm.eps).rsqrt()
        return weight_OC * scale_O[:, None], bias_O - mean_O * scale_O

    def _statistics(
        self,
        maps_BCHW: Tensor,
        moments: tuple[Tensor, Tensor] | None,
        weight_OC: Tensor,
        norm: nn.BatchNorm2d,
    ) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the convolution's output (O,); in training, the batch's."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        dtype = weight_OC.dtype
        if not self.training:
            return norm.running_mean.to(dtype), norm.running_var.to(dtype)
        count = maps_BCHW[:, 0].numel()
        require(statistics_problem(count))
        moments = moments or channel_moments(maps_BCHW, self._operators)
        mean_C, covariance_CC = moments[0].to(dtype), moments[1].to(dtype)
        mean_O = weight_OC @ mean_C
        variance_O = ((weight_OC @ covariance_CC) * weight_OC).sum(1).clamp_min(0.0)
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            for running_O, new_O in (
                (norm.running_mean, mean_O),
                (norm.running_var, variance_O * count / (count - 1)),
            ):
                running_O.lerp_(new_O.to(running_O.dtype), norm.momentum or 0.0)
        return mean_O, variance_O


def channel_moments(maps_BCHW: Tensor, operators: Operators = PLAIN) -> tuple[Tensor, Tensor]:
    """Return mean (C,) and covariance (C, C) of the channels over all positions of a batch."""
    return operators.covariance(maps_BCHW.flatten(2))


@full_precision
def mixed_covariance(covariance_CC: Tensor, weight_OC: Tensor) -> Tensor:
    """Return the covariance (O, O) of channels after mixing by weights."""
    return weight_OC @ covariance_CC @ weight_OC.mT


def statistics_problem(count: int) -> str | None:
    """Return a problem if a channel has a single value in a batch, and hence no variance."""
    if count != 1:
        return None
    return "batch normalisation of a 1x1 map needs at least 2 images in a batch; got 1"


@full_precision
def mixed(maps_BCHW: Tensor, weight_OC: Tensor, bias_O: Tensor) -> Tensor:
    """Return maps (B, O, H, W) whose channels are mixed by weights and shifted."""
    # on a CPU, up to four times as fast as the convolution for the few samples of a part
    batch, _, height, width = maps_BCHW.shape
    bias_BON = bias_O[:, None].expand(batch, -1, height * width)
    weight_BOC = weight_OC.expand(batch, -1, -1)
    return torch.baddbmm(bias_BON, weight_BOC, maps_BCHW.flatten(2)).unflatten(2, (height, width))
