"""Metrics of the teacher's channel graphs as auxiliary tasks for the student.

[paper] (arXiv 1911.05700): metrics of network theory as tasks beside the main loss; it is about
given graphs. [ours]: the graphs of channels, the choice of metrics, the 1x1 convolutions as the
tasks' heads, and the loss.

Shape letters: B batch, C channels, O channels of the teacher, H height, W width, G graphs,
M metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raygkd.errors import ConfigError
from raygkd.graph import adjacency, choice_problem, full_precision, require
from raygkd.graph.vertex_metrics import metrics_problems, vertex_metrics
from raygkd.losses.adapters import Adapter, mixed, mixed_covariance
from raygkd.losses.base import FeatureLoss, Setup
from raygkd.losses.batch_graph import correlations
from raygkd.losses.levels import on_one_grid
from raygkd.registry import METHODS, option

# added to the spread of a metric over the vertices, as a share of its mean
SPREAD_FLOOR = 1e-2
# bytes of adjacency that are processed at a time; the metrics need some twenty times as much
PART_BYTES = 1 << 23


@full_precision
def metrics_loss(student_GCC: Tensor, teacher_GCC: Tensor, names: Sequence[str]) -> Tensor:
    """Return the squared differences of the vertices' metrics, in units of the teacher's spread.

    ``mean_gmi (s_gmi - t_gmi)^2 / (v_gm + f^2 u_gm^2)``, with mean u and variance v of the
    teacher's metric m over the vertices of graph g, and f = 0.01.

    Args:
        student_GCC: similarities of channels, see ``vertex_metrics``.
        teacher_GCC: the same of the teacher; they get no gradient.
        names: of the metrics.

    Returns:
        A scalar without unit.

    Raises:
        ConfigError: an unknown metric, or none.

    Source: [ours], see above.
    """
    with torch.no_grad():
        target_GMC = vertex_metrics(teacher_GCC, names)
        variance_GM1, mean_GM1 = torch.var_mean(target_GMC, -1, correction=0, keepdim=True)
        scale_GM1 = variance_GM1 + (SPREAD_FLOOR * mean_GM1).square()
    squares_GMC = (vertex_metrics(student_GCC, names) - target_GMC).square()
    return (squares_GMC / scale_GM1).mean()


@full_precision
def batch_covariance(maps_BCHW: Tensor) -> Tensor:
    """Return the covariance (C, C) of channels over all positions of a batch."""
    rows_CN = maps_BCHW.transpose(0, 1).flatten(1)
    rows_CN = rows_CN - rows_CN.mean(1, keepdim=True)
    return rows_CN @ rows_CN.mT / rows_CN.shape[1]


@METHODS.register("graph-metrics")
class GraphMetrics(FeatureLoss):
    """Metrics of the vertices of channel graphs, see ``metrics_loss``.

    The student's channels go through a 1x1 convolution to the teacher's, trained with it, and the
    metrics are those of their graph: of the batch, whose edges are correlations over all its
    positions, or of each image, whose edges are cosines of maps.

    Args:
        setup: what it is built for; it needs the shapes.
        metrics: names of the metrics.
        graphs: "batch" or "image".

    Raises:
        ConfigError: an unknown metric or kind of graph, missing shapes, or a teacher's level of
            less than three channels.
    """

    weight = 1.0
    # the published weight is unknown
    baseline_share = 1.0
    levels = "all"
    source = "Ma and Mei, arXiv 1911.05700, for tasks on given graphs; on channels: ours"

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of the loss."""

        metrics: tuple[str, ...] = option(
            ("degree", "clustering", "pagerank", "eigenvector", "closeness"),
            "metrics of the channel graphs to predict, one or more",
            choices=("degree", "clustering", "pagerank", "eigenvector", "closeness"),
            search={
                "choice": (
                    ["degree", "clustering", "pagerank", "eigenvector", "closeness"],
                    ["degree", "clustering"],
                    ["pagerank", "eigenvector", "closeness"],
                )
            },
        )
        graphs: str = option(
            "batch",
            "one graph of channels per batch, or one per image",
            choices=("batch", "image"),
        )

    def __init__(self, setup: Setup, *, metrics: Sequence[str], graphs: str):
        super().__init__(setup)
        require(*metrics_problems(metrics), choice_problem("graphs", graphs, ("batch", "image")))
        self.require_shapes("each level has a convolution of its own")
        self.metrics, self.graphs = tuple(metrics), graphs
        self.adapters = nn.ModuleDict()
        for level in self._levels(self.student_shapes):
            channels = self.teacher_shapes[level][0]
            if channels < 3:
                raise ConfigError(
                    f"{self.name}: level {level} of the teacher has {channels} channels, and "
                    "metrics of a graph need at least 3; choose other --levels"
                )
            self.adapters[str(level)] = Adapter(self.student_shapes[level][0], channels)

    def level_loss(self, level: int, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Return ``metrics_loss`` of the batch's graph, or the mean of the images'."""
        adapter = self.adapters[str(level)]
        assert isinstance(adapter, Adapter)
        student_BCHW, teacher_BCHW = on_one_grid(student_BCHW, teacher_BCHW)
        weight_OC, bias_O = adapter.mixing(student_BCHW)
        if self.graphs == "batch":
            student_CC = mixed_covariance(batch_covariance(student_BCHW), weight_OC)
            teacher_CC = batch_covariance(teacher_BCHW)
            return metrics_loss(
                correlations(student_CC)[None], correlations(teacher_CC)[None], self.metrics
            )
        size = max(1, PART_BYTES // (len(weight_OC) ** 2 * student_BCHW.element_size()))
        total = student_BCHW.new_zeros(())
        for images in zip(student_BCHW.split(size), teacher_BCHW.split(size), strict=True):
            # graphs of a part are computed again for its gradient, not kept
            part = checkpoint(self._image_loss, *images, weight_OC, bias_O, use_reentrant=False)
            total = total + part * len(images[0])
        return total / len(student_BCHW)

    def _image_loss(
        self, student_BCHW: Tensor, teacher_BCHW: Tensor, weight_OC: Tensor, bias_O: Tensor
    ) -> Tensor:
        """Return the mean loss of the images of a part."""
        student_BOHW = mixed(student_BCHW, weight_OC, bias_O)
        return metrics_loss(adjacency(student_BOHW), adjacency(teacher_BCHW), self.metrics)
