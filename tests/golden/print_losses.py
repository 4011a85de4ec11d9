"""Print the values of every loss and baseline on fixed maps: the content of losses.json.

Run ``python tests/golden/print_losses.py > tests/golden/losses.json`` after a wanted change of a
formula, and say in the commit why the values changed.

Shape letters: B batch, C channels, H height, W width, K classes.
"""

import json
import math

import torch
from torch import Tensor

from raygkd.graph import ATTENTION_MODES, WEIGHTS
from raygkd.losses import (
    SPECTRAL_MODES,
    baseline_loss,
    baseline_names,
    edge_loss,
    kd_loss,
    spectral_loss,
    vertex_loss,
)

SHAPES = {"narrow": (2, 5, 3, 4), "wide": (2, 12, 2, 3)}
# level -> (C, H, W)
STUDENT = {1: (4, 8, 8), 2: (6, 4, 4), 3: (8, 2, 2)}
TEACHER = {1: (6, 4, 4), 2: (6, 4, 4), 3: (10, 2, 2)}
CANVAS = 32
BOXES = (((0.0, 4.0, 20.0, 17.0), (18.0, 2.0, 31.0, 9.0)), (), ((3.0, 3.0, 5.0, 5.0),))


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
    losses |= {f"baseline {name}": _baseline(name) for name in baseline_names()}
    return {name: loss.item() for name, loss in losses.items()}


def _baseline(name: str) -> Tensor:
    """Return the value of a baseline with its published settings, in eval mode."""
    # some draw, even in eval mode
    torch.manual_seed(0)
    shapes = {"student_shapes": STUDENT, "teacher_shapes": TEACHER, "canvas": CANVAS}
    module = baseline_loss(name, embedding_sizes=(4, 5), **shapes)
    module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(maps(tuple(parameter.shape), 0.9) - 1.0)
    return module(
        student_logits=maps((3, 6), 0.7),
        teacher_logits=maps((3, 6), 1.3),
        student_features={level: maps((3, *shape), 0.7) for level, shape in STUDENT.items()},
        teacher_features={level: maps((3, *shape), 1.3) for level, shape in TEACHER.items()},
        student_embeddings=maps((3, 4), 0.7),
        teacher_embeddings=maps((3, 5), 1.3),
        student_proxies=maps((6, 4), 0.7),
        teacher_proxies=maps((6, 5), 1.3),
        targets=torch.tensor([0, 5, 2]),
        boxes=[torch.tensor(boxes).reshape(-1, 4) for boxes in BOXES],
    )


if __name__ == "__main__":
    print(json.dumps(golden_losses(), indent=2))
