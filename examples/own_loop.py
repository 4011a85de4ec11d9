"""Distil in your own training loop: the graph losses beside the loss of the labels.

    python examples/own_loop.py

It needs neither Ray nor MLflow.

Shapes: B batch, H height, W width, K classes.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import raygkd

EPOCHS, LR = 80, 1e-2


def network(width: int) -> nn.Sequential:
    """Return a small CNN of images (B, 1, 8, 8) to logits (B, 10)."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)),
    )


def train(
    student: nn.Module, loader: DataLoader[tuple[Tensor, ...]], teacher: nn.Module | None
) -> None:
    """Train a student, with a teacher if there is one."""
    images_BCHW, _ = next(iter(loader))
    matching = None
    if teacher is not None:
        # modules 0 and 1 of both networks give the maps that are matched
        matching = raygkd.Matching(teacher, student, images_BCHW, levels=["0", "1"], alpha=3.0)
    adapters = [] if matching is None else list(matching.parameters())
    optimizer = torch.optim.AdamW([*student.parameters(), *adapters], lr=LR)
    student.train()
    for _ in range(EPOCHS):
        for images_BCHW, labels_B in loader:
            if matching is None:
                loss = cross_entropy(student(images_BCHW), labels_B)
            else:
                logits_BK, distillation = matching(images_BCHW)
                loss = cross_entropy(logits_BK, labels_B) + distillation
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.inference_mode()
def accuracy(model: nn.Module, images_BCHW: Tensor, labels_B: Tensor) -> float:
    """Return the share of images whose class is right."""
    model.eval()
    return float((model(images_BCHW).argmax(1) == labels_B).float().mean())


def main() -> None:
    """Train a teacher, and a student without and with it; print their accuracy."""
    digits = load_digits()
    images_BCHW = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    labels_B = torch.tensor(digits.target)
    tested = (images_BCHW[1400:], labels_B[1400:])
    all_images = DataLoader(TensorDataset(images_BCHW[:1400], labels_B[:1400]), 64, shuffle=True)
    few_images = DataLoader(TensorDataset(images_BCHW[:200], labels_B[:200]), 32, shuffle=True)

    torch.manual_seed(0)
    teacher = network(32)
    train(teacher, all_images, None)
    for name, helper in (("alone", None), ("with the teacher", teacher.eval())):
        torch.manual_seed(1)
        student = network(8)
        train(student, few_images, helper)
        print(f"student {name}: {accuracy(student, *tested):.3f}")
    print(f"teacher: {accuracy(teacher, *tested):.3f}")


if __name__ == "__main__":
    main()
