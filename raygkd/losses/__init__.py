"""Distillation losses: functions of tensors, modules that hold the adapters, and baselines."""

from raygkd.losses.base import BaselineLoss
from raygkd.losses.baselines import BASELINES, Baseline, baseline_loss
from raygkd.losses.graph import (
    ADAPTERS,
    SPECTRAL_MODES,
    GraphDistillationLoss,
    TeacherGraph,
    edge_loss,
    spectral_loss,
    vertex_loss,
)
from raygkd.losses.logits import kd_loss
from raygkd.losses.spectral import procrustes_distance, residual_distance, subspace_distance

__all__ = [
    "ADAPTERS",
    "BASELINES",
    "SPECTRAL_MODES",
    "Baseline",
    "BaselineLoss",
    "GraphDistillationLoss",
    "TeacherGraph",
    "baseline_loss",
    "edge_loss",
    "kd_loss",
    "procrustes_distance",
    "residual_distance",
    "spectral_loss",
    "subspace_distance",
    "vertex_loss",
]
