"""Distillation losses: functions of tensors, modules with adapters, and baselines."""

from raygkd.graph import TeacherGraph
from raygkd.losses.adapters import ADAPTERS
from raygkd.losses.base import BaselineLoss
from raygkd.losses.baselines import (
    baseline_class,
    baseline_loss,
    baseline_names,
    baseline_of,
    reads_labels,
    trains_classifier,
)
from raygkd.losses.graph import GraphDistillationLoss
from raygkd.losses.level_terms import SPECTRAL_MODES, edge_loss, spectral_loss, vertex_loss
from raygkd.losses.logits import kd_loss
from raygkd.losses.spectral import procrustes_distance, residual_distance, subspace_distance

__all__ = [
    "ADAPTERS",
    "SPECTRAL_MODES",
    "BaselineLoss",
    "GraphDistillationLoss",
    "TeacherGraph",
    "baseline_class",
    "baseline_loss",
    "baseline_names",
    "baseline_of",
    "edge_loss",
    "kd_loss",
    "procrustes_distance",
    "reads_labels",
    "residual_distance",
    "spectral_loss",
    "subspace_distance",
    "trains_classifier",
    "vertex_loss",
]
