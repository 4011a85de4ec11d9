"""Print the values of every loss on fixed maps: the content of losses.json.

Run ``python tests/golden/print_losses.py > tests/golden/losses.json`` after a wanted change of a
formula, and say in the commit why the values changed.

Shape letters: B batch, C channels, H height, W width, K classes.
"""

import json
import math

import torch
from torch import Tensor

from raygkd.graph import ATTENTION_MODES, WEIGHTS
from raygkd.losses import SPECTRAL_MODES, edge_loss, kd_loss, spectral_loss, vertex_loss

SHAPES = {"narrow": (2, 5, 3, 4), "wide": (2, 12, 2, 3)}


def maps(shape: tuple[int, ...], frequency: float) -> Tensor:
    """Return positive float64 values of a shape, from a formula and so the same everywhere."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return (1.2 + torch.sin(frequency * steps + 0.01 * steps**2)).reshape(shape)


def golden_losses() -> dict[str, float]:
    """Return the value of every loss in every mode."""
    losses = {}
    for name, shape in SHAPES.items():
        student_BCHW, teacher_BCHW = maps(shape, 0.7), maps(shape, 1.3)
        losses[f"vertex {name}"] = vertex_loss(student_BCHW, teacher_BCHW, 0.5)
        for attention in ATTENTION_MODES:
            losses[f"edge {attention} {name}"] = edge_loss(
                student_BCHW, teacher_BCHW, 0.5, attention
            )
        for mode in SPECTRAL_MODES:
            for weights in WEIGHTS:
                losses[f"spectral {mode} {weights} {name}"] = spectral_loss(
                    student_BCHW, teacher_BCHW, 3, mode, weights
                )
    losses["kd"] = kd_loss(maps((4, 6), 0.7), maps((4, 6), 1.3), 4.0)
    return {name: loss.item() for name, loss in losses.items()}


if __name__ == "__main__":
    print(json.dumps(golden_losses(), indent=2))
