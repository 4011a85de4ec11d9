"""Distillation losses: pure functions of tensors, and a module that holds the adapters."""

from raygkd.losses.graph import (
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
    "SPECTRAL_MODES",
    "GraphDistillationLoss",
    "TeacherGraph",
    "edge_loss",
    "kd_loss",
    "procrustes_distance",
    "residual_distance",
    "spectral_loss",
    "subspace_distance",
    "vertex_loss",
]
