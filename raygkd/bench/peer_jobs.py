"""A small job from the prompt to a scored model: ``raygkd train``, plain torch, and Lightning.

``python -m raygkd.bench.peer_jobs plain EPOCHS`` trains a teacher and a student on the handwritten
digits with logit distillation, as ``raygkd train`` does, and prints the student's test accuracy.
``lightning`` does so with Lightning's trainer.

Shapes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from raygkd.bench.rows import Row, Rows
from raygkd.data.sklearn_digits import load_digits
from raygkd.errors import RunFailed
from raygkd.models import build_model
from raygkd.optional_packages import require

TEACHER, STUDENT = "resnet20", "resnet8"
BATCH, LR, MOMENTUM, WEIGHT_DECAY, TEMPERATURE = 64, 0.05, 0.9, 5e-4, 4.0
SIDE, CLASSES = (8, 8), 10
# against a script that imports nothing but torch, and against another trainer
BOUNDS = {"plain": 2.0, "lightning": 1.5}
NAMES = {"plain": "a plain torch script", "lightning": "a Lightning script"}


def peer_job_rows(*, quick: bool) -> Rows:
    """Yield the seconds of the whole of a small job beside those of others, by turns."""
    require("lightning", of="raygkd bench peers", extra="peers")
    epochs, rounds = (3, 3) if quick else (10, 5)
    seconds: dict[str, list[float]] = {name: [] for name in ("raygkd", *BOUNDS)}
    for _ in range(rounds):
        for name, each in seconds.items():
            each.append(_seconds(name, epochs))
    for peer, bound in BOUNDS.items():
        yield Row(
            what=f"teacher and student on digits, {epochs} epochs, from the prompt",
            against=NAMES[peer],
            value=statistics.median(
                ours / theirs for ours, theirs in zip(seconds["raygkd"], seconds[peer], strict=True)
            ),
            unit="x",
            bound=bound,
            configuration={"seconds": {name: statistics.median(seconds[name]) for name in seconds}},
        )


def _seconds(name: str, epochs: int) -> float:
    """Run a job; return how long it takes."""
    with tempfile.TemporaryDirectory(prefix="raygkd-bench-") as folder:
        started = time.perf_counter()
        done = subprocess.run(
            _command(name, epochs, folder), capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - started
    if done.returncode:
        raise RunFailed(f"the job in {name} ended with {done.returncode}: {done.stderr[-500:]}")
    return seconds


def _command(name: str, epochs: int, folder: str) -> list[str]:
    if name != "raygkd":
        return [sys.executable, "-m", "raygkd.bench.peer_jobs", name, str(epochs)]
    return [
        *(sys.executable, "-m", "raygkd", "train", "--dataset", "digits", "--method", "kd"),
        *("--teacher", TEACHER, "--student", STUDENT, "--teacher-epochs", str(epochs)),
        *("--epochs", str(epochs), "--batch-size", str(BATCH), "--output", folder),
    ]


def _data() -> tuple[TensorDataset, TensorDataset]:
    """Return the training and the test images, normalised (B, 3, H, W), with labels (B,)."""
    digits = load_digits()
    images_BHW = torch.from_numpy(digits.images_BHW).float() / 255
    images_BHW = (images_BHW - images_BHW.mean()) / images_BHW.std()
    images_BCHW = images_BHW[:, None].expand(-1, 3, -1, -1)
    labels_B, is_test_B = torch.from_numpy(digits.label), torch.from_numpy(digits.is_test)
    train, test = (
        TensorDataset(images_BCHW[chosen], labels_B[chosen]) for chosen in (~is_test_B, is_test_B)
    )
    return train, test


def _loss(logits_BK: Tensor, labels_B: Tensor, teacher_BK: Tensor | None) -> Tensor:
    loss = F.cross_entropy(logits_BK, labels_B)
    if teacher_BK is None:
        return loss
    student_BK, target_BK = (F.log_softmax(one / TEMPERATURE, 1) for one in (logits_BK, teacher_BK))
    soft = F.kl_div(student_BK, target_BK, reduction="batchmean", log_target=True)
    return loss + soft * TEMPERATURE**2


def _optimizer(model: nn.Module, steps: int) -> tuple[Any, Any]:
    optimizer = torch.optim.SGD(
        model.parameters(), LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def plain(epochs: int) -> float:
    """Train a teacher and a student in a loop; return the student's test accuracy."""
    train, test = _data()
    loader = DataLoader(train, BATCH, shuffle=True, drop_last=True)
    teacher: nn.Module | None = None
    for name in (TEACHER, STUDENT):
        model = build_model(name, CLASSES, SIDE)
        optimizer, schedule = _optimizer(model, epochs * len(loader))
        for _ in range(epochs):
            for images_BCHW, labels_B in loader:
                with torch.no_grad():
                    teacher_BK = None if teacher is None else teacher(images_BCHW)
                optimizer.zero_grad()
                _loss(model(images_BCHW), labels_B, teacher_BK).backward()
                optimizer.step()
                schedule.step()
        teacher = model.eval()
    assert teacher is not None
    with torch.no_grad():
        images_BCHW, labels_B = test.tensors
        return float((teacher(images_BCHW).argmax(1) == labels_B).float().mean())


def with_lightning(epochs: int) -> float:
    """Train a teacher and a student with Lightning; return the student's test accuracy."""
    import lightning

    train, test = _data()
    loader = DataLoader(train, BATCH, shuffle=True, drop_last=True)

    class Distilled(lightning.LightningModule):
        """A model that learns from labels, and from a teacher if there is one."""

        def __init__(self, name: str, teacher: nn.Module | None):
            super().__init__()
            self.model = build_model(name, CLASSES, SIDE)
            # a module in a list is not registered
            self.teachers = [] if teacher is None else [teacher]

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            """Return the loss of a batch."""
            images_BCHW, labels_B = batch
            with torch.no_grad():
                said = [teacher(images_BCHW) for teacher in self.teachers]
            return _loss(self.model(images_BCHW), labels_B, said[0] if said else None)

        def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            """Log the accuracy."""
            images_BCHW, labels_B = batch
            self.log("score", (self.model(images_BCHW).argmax(1) == labels_B).float().mean())

        def configure_optimizers(self) -> Any:
            """Return SGD with a cosine."""
            optimizer, schedule = _optimizer(self, epochs * len(loader))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    trained: nn.Module | None = None
    for name in (TEACHER, STUDENT):
        module = Distilled(name, trained)
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader)
        trained = module.model.eval()
    [result] = trainer.test(module, DataLoader(test, len(test)), verbose=False)
    return float(result["score"])


JOBS = {"plain": plain, "lightning": with_lightning}

if __name__ == "__main__":
    print(JOBS[sys.argv[1]](int(sys.argv[2])))
