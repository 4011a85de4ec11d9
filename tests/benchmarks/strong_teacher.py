"""A strong teacher at useful length: any loss against any other, in minutes and on a CPU.

    python tests/benchmarks/strong_teacher.py prepare cifar10.parquet resnet56.th cache.pt
    python tests/benchmarks/strong_teacher.py run cache.pt results.jsonl --epochs 10 \\
        --seeds 0 1 2 --losses none "0.1*labels+0.9*kd" 3@graph:alpha=1,beta=0,gamma=0
    python tests/benchmarks/strong_teacher.py table results.jsonl

The teacher's logits and maps are worked out once for both views of 5,000 training images, and kept
as float16. A student sees those views, and is scored on 5,000 other training images. Runs take one
thread each and go two at a time; each writes a JSON line with its score and, over time, the norm of
each term's gradient in the student and in the adapters, beside that of the labels.

A loss is a sum of terms ``NAME[:OPTION=VALUE,...]``, each behind a weight: ``2*`` in units of the
loss, or ``3@`` for three times the labels' gradient in the student over the first steps. Names are
``labels`` (weight 1 where it is not named), the baselines of ``raygkd.losses``, ``graph`` (its
``GraphDistillationLoss``, whose alpha, beta and gamma take the unit), and the forms of
``graph_forms.py``, which take ``levels=last`` and ``adapter=none|cut`` besides their own options.
Any term takes ``fall=linear``: its weight falls to 0 over the run; ``fall=ahead``: it is 0 after an
epoch at whose end the student was ahead of the teacher on 1,000 images used for nothing else;
``fall=lead``: it falls with the teacher's lead on them; ``fall=lead2`` and ``lead4``: with two and
four times the lead, where that is below 1; the latter is ``--fade lead``.

Shapes: B batch, C channels, H height, W width, K classes, V views.
"""

from __future__ import annotations

import argparse
import inspect
import io
import itertools
import math
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from graph_forms import FORMS
from PIL import Image
from run_pool import read_lines, run_missing
from torch import Tensor, nn

from raygkd.losses import GraphDistillationLoss, baseline_class, baseline_loss
from raygkd.losses.adapters import Adapter
from raygkd.losses.levels import on_one_grid
from raygkd.models import FeatureTap, build_classifier, feature_shapes

IMAGES, HELD_OUT = 5000, 1000
BATCH, LR, WEIGHT_DECAY = 64, 0.1, 5e-4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# steps over which the gradients are measured that weights are shares of
CALIBRATION = 20
RECORDS = 12
LEVELS = (1, 2, 3)


class PaddedBlock(nn.Module):
    """Two convolutions, and a shortcut without parameters (He et al. 2016, option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.missing = stride, channels - in_channels

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        hidden_BCHW = F.relu(self.bn1(self.conv1(maps_BCHW)))
        kept_BCHW = maps_BCHW[:, :, :: self.stride, :: self.stride]
        padding = (0, 0, 0, 0, self.missing // 2, self.missing - self.missing // 2)
        return F.relu(self.bn2(self.conv2(hidden_BCHW)) + F.pad(kept_BCHW, padding))


class PaddedResNet56(nn.Module):
    """ResNet-56 for CIFAR-10 as its published weights have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for number, (before, after) in enumerate(itertools.pairwise(widths), start=1):
            first = PaddedBlock(before, after, 1 if number == 1 else 2)
            others = (PaddedBlock(after, after, 1) for _ in range(8))
            self.add_module(f"layer{number}", nn.Sequential(first, *others))
        self.linear = nn.Linear(64, 10)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return logits and the maps of the three stages."""
        hidden_BCHW = F.relu(self.bn1(self.conv1(images_BCHW)))
        maps = []
        for number in LEVELS:
            hidden_BCHW = self.get_submodule(f"layer{number}")(hidden_BCHW)
            maps.append(hidden_BCHW)
        return self.linear(hidden_BCHW.mean((2, 3))), maps


def published(path: str) -> PaddedResNet56:
    """Return the published teacher of a file."""
    state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    model = PaddedResNet56()
    model.load_state_dict({name.removeprefix("module."): part for name, part in state.items()})
    return model.eval()


def decoded(path: str) -> tuple[Tensor, Tensor]:
    """Return pixels uint8 (N, 3, 32, 32) and labels (N,) of the training split's first images."""
    from pyarrow import parquet

    rows = parquet.read_table(path, filters=[("split", "=", "train")]).slice(
        0, 2 * IMAGES + HELD_OUT
    )
    images = [
        np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
        for encoded in rows.column("image").to_pylist()
    ]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.from_numpy(rows.column("label").to_numpy().astype(np.int64))


def inputs(pixels_BCHW: Tensor) -> Tensor:
    """Return normalised images of pixels."""
    mean, std = (torch.tensor(part)[:, None, None] for part in (MEAN, STD))
    return (pixels_BCHW.float() / 255 - mean) / std


@torch.no_grad()
def prepare(source: str, weights: str, target: str, teacher_epochs: int) -> None:
    """Write images and what the teacher says of both views of those for training."""
    pixels, labels = decoded(source)
    if weights.endswith(".th"):
        teacher: nn.Module = published(weights)
    else:
        with torch.enable_grad():
            teacher = trained_teacher(weights, pixels[:IMAGES], labels[:IMAGES], teacher_epochs)
    logits: list[list[Tensor]] = [[], []]
    maps: dict[int, list[list[Tensor]]] = {level: [[], []] for level in LEVELS}
    for view in range(2):
        for part in pixels[:IMAGES].split(250):
            seen = inputs(part).flip(3) if view else inputs(part)
            of_part, levels = teacher(seen)
            logits[view].append(of_part)
            for level, found in zip(LEVELS, levels, strict=True):
                maps[level][view].append(found.half())
    stored = {
        "pixels": pixels,
        "labels": labels,
        "logits": torch.stack([torch.cat(of_view) for of_view in logits], 1),
        **{
            f"map {level}": torch.stack([torch.cat(of_view) for of_view in views], 1)
            for level, views in maps.items()
        },
    }
    right = [
        float((stored["logits"][:, view].argmax(1) == labels[:IMAGES]).float().mean())
        for view in range(2)
    ]
    tested = torch.cat([teacher(inputs(part))[0] for part in pixels[IMAGES:].split(250)])
    correct = (tested.argmax(1) == labels[IMAGES:]).float()
    stored["teacher_held_out"] = correct[IMAGES:].mean()
    score = float(correct[:IMAGES].mean())
    print(f"teacher: {right} of the training images (both views), {score:.4f} of the others")
    torch.save(stored, target)


class WithMaps(nn.Module):
    """A built-in classifier that returns the maps of its stages beside its logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._tap = FeatureTap(model, LEVELS)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits_BK, features = self._tap(images_BCHW)
        return logits_BK, list(features.values())


def trained_teacher(name: str, pixels: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """Return a weak teacher: a built-in classifier after a few epochs on the same images."""
    torch.manual_seed(1000)
    teacher = WithMaps(build_classifier(name, 10))
    steps = len(labels) // BATCH * epochs
    optimizer, schedule = recipe(list(teacher.parameters()), steps)
    order = torch.Generator().manual_seed(1000)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=order).split(BATCH)[
            : len(labels) // BATCH
        ]:
            mirrored = torch.rand(BATCH, generator=order) < 0.5
            seen = inputs(pixels[rows])
            seen[mirrored] = seen[mirrored].flip(3)
            loss = F.cross_entropy(teacher(seen)[0], labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return teacher.eval()


def recipe(
    parameters: list[nn.Parameter], steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return SGD with Nesterov momentum, and a cosine to 0."""
    optimizer = torch.optim.SGD(
        parameters, LR, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


@dataclass
class Batch:
    """What a term takes of a batch: both sides' logits and maps, and the labels."""

    labels_B: Tensor
    student_logits_BK: Tensor
    teacher_logits_BK: Tensor
    student: dict[int, Tensor]
    teacher: dict[int, Tensor]


class Term(nn.Module):
    """One term of a loss, with its adapters.

    Attributes:
        weight: its weight, or the share of the labels' gradient.
        is_share: whether it is the latter.
    """

    def __init__(self, text: str, shapes: Mapping[str, Any], adapters: nn.ModuleDict):
        super().__init__()
        self.text = text
        weight, sign, head = re.match(r"(?:([0-9.]+)([@*]))?(.+)", text).groups()
        self.weight, self.is_share = float(weight or 1), sign == "@"
        self.name, _, listed = head.partition(":")
        self.options = {
            key: _value(value)
            for key, _, value in (pair.partition("=") for pair in listed.split(",") if pair)
        }
        self.levels = LEVELS[-1:] if self.options.pop("levels", "all") == "last" else LEVELS
        self.through = str(self.options.pop("adapter", "shared"))
        self.fall = self.options.pop("fall", "no")
        self.module: nn.Module | None = None
        if self.name == "graph":
            settings = {"temperature": 5.0, "dim": 8, "alpha": 100.0, "beta": 10.0, "gamma": 1.0}
            settings |= {"adapter": "normalised", **self.options}
            self.module = GraphDistillationLoss(shapes["student"], shapes["teacher"], **settings)
        elif self.name in FORMS:
            unknown = self.options.keys() - inspect.signature(FORMS[self.name]).parameters.keys()
            assert not unknown, f"{text}: no options {unknown}"
            self.adapters = adapters
        elif self.name != "labels":
            self.module = baseline_loss(
                self.name,
                student_shapes=shapes["student"],
                teacher_shapes=shapes["teacher"],
                **self.options,
            )

    @property
    def reads_maps(self) -> bool:
        """Whether it takes the teacher's maps."""
        return self.name in ("graph", *FORMS) or (
            self.name != "labels" and baseline_class(self.name).reads == "features"
        )

    @property
    def weights(self) -> dict[str, float]:
        """Return the weight of each value that a call returns."""
        if isinstance(self.module, GraphDistillationLoss):
            weights = self.module.term_weights
            return {f"{self.text} {name}": self.weight * w for name, w in weights.items()}
        return {self.text: self.weight}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the unweighted values by name."""
        if isinstance(self.module, GraphDistillationLoss):
            terms = self.module(batch.student, batch.teacher)
            return {f"{self.text} {name}": value for name, value in terms.items()}
        return {self.text: self._value(batch)}

    def _value(self, batch: Batch) -> Tensor:
        if self.name == "labels":
            return F.cross_entropy(batch.student_logits_BK, batch.labels_B)
        if self.module is not None:
            return self.module(
                student_logits=batch.student_logits_BK,
                teacher_logits=batch.teacher_logits_BK,
                student_features=batch.student,
                teacher_features=batch.teacher,
                targets=batch.labels_B,
            )
        terms = []
        for level in self.levels:
            student, teacher = on_one_grid(batch.student[level], batch.teacher[level])
            if self.through == "shared":
                student = self.adapters[str(level)](student)
            elif self.through == "cut":
                student = self._cut_adapter(level, student)
            terms.append(FORMS[self.name](student, teacher, **self.options))
        return torch.stack(terms).mean()

    def _cut_adapter(self, level: int, student_BCHW: Tensor) -> Tensor:
        """Apply the shared adapter without a gradient in its parameters."""
        adapter = self.adapters[str(level)]
        weight_OC, bias_O = adapter.mixing(student_BCHW)
        mixed = torch.einsum("oc,bchw->bohw", weight_OC.detach(), student_BCHW)
        return mixed + bias_O.detach()[:, None, None]


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() and "." not in text else number


class Loss(nn.Module):
    """A weighted sum of terms; see the module's text for how it is written."""

    def __init__(self, text: str, shapes: Mapping[str, Any]):
        super().__init__()
        self.adapters = nn.ModuleDict(
            {
                str(level): Adapter(of_student[0], shapes["teacher"][level][0], "normalised")
                for level, of_student in shapes["student"].items()
            }
        )
        written = [] if text == "none" else text.split("+")
        self.terms = nn.ModuleList([Term(part, shapes, self.adapters) for part in written])
        if not any(term.name == "labels" for term in self.terms):
            self.terms.insert(0, Term("labels", shapes, self.adapters))
        self.weights = {name: w for term in self.terms for name, w in term.weights.items()}
        self.shares = {name for term in self.terms if term.is_share for name in term.weights}
        self.labels = next(term.text for term in self.terms if term.name == "labels")
        self.norms: dict[str, list[float]] = defaultdict(list)
        self.falls = {name: term.fall for term in self.terms for name in term.weights}
        self.lead = [1.0]
        used = [t for t in self.terms if t.name in FORMS and t.through == "shared"]
        if not used:
            self.adapters.requires_grad_(False)

    def scales(self, progress: float) -> dict[str, float]:
        """Return what each term is multiplied by, after a share of all steps."""
        means = {name: max(statistics.fmean(norms), 1e-12) for name, norms in self.norms.items()}
        lead = max(self.lead[-1], 0.0)
        left = {
            "no": 1.0,
            "linear": 1.0 - progress,
            "ahead": float(lead > 0),
            "lead": lead / max(self.lead),
            "lead2": min(1.0, 2 * lead / max(self.lead)),
            "lead4": min(1.0, 4 * lead / max(self.lead)),
        }
        return {
            name: weight
            * (means[self.labels] / means[name] if name in self.shares else 1.0)
            * left[self.falls[name]]
            for name, weight in self.weights.items()
        }

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the unweighted values by name."""
        return {name: value for term in self.terms for name, value in term(batch).items()}


def gradient(term: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Return a scalar's gradient in all parameters as one vector."""
    found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if part is None else part).flatten()
            for p, part in zip(parameters, found, strict=True)
        ]
    )


def run_one(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Train one student and return its line."""
    torch.set_num_threads(1)
    stored = torch.load(asked["path"], weights_only=True, mmap=True)
    torch.manual_seed(asked["seed"])
    student = build_classifier(asked["student"], 10)
    student.to(memory_format=torch.channels_last)
    tap = FeatureTap(student, LEVELS)
    shapes = {
        "student": feature_shapes(student, LEVELS, (32, 32)),
        "teacher": {level: tuple(stored[f"map {level}"].shape[2:]) for level in LEVELS},
    }
    loss = Loss(asked["loss"], shapes)
    loss.lead = [float(stored["teacher_held_out"])]
    needs_maps = any(term.reads_maps for term in loss.terms)
    steps_per_epoch = IMAGES // BATCH
    total = steps_per_epoch * asked["epochs"]
    trained = [*student.parameters(), *(p for p in loss.parameters() if p.requires_grad)]
    optimizer, schedule = recipe(trained, total)
    started, step, record = time.perf_counter(), 0, []
    record_at = {round(total * i / RECORDS) for i in range(RECORDS)}
    own = list(student.parameters())
    others = [p for p in loss.parameters() if p.requires_grad]
    for epoch in range(asked["epochs"]):
        for batch in batches(stored, asked["seed"], epoch, tap, needs_maps):
            terms = loss(batch)
            is_calibrating = step < CALIBRATION and bool(loss.shares)
            if is_calibrating or step in record_at:
                found = {name: gradient(value, own) for name, value in terms.items()}
                if is_calibrating:
                    for name, vector in found.items():
                        loss.norms[name].append(float(vector.norm()))
                if step in record_at:
                    record.append(recorded(step, terms, found, others, loss, step / total))
            scales = loss.scales(step / total)
            value = torch.stack([scales[name] * term for name, term in terms.items()]).sum()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            step += 1
        if not math.isfinite(value.item()):
            break
        if set(loss.falls.values()) & {"ahead", "lead", "lead2", "lead4"}:
            known = accuracy(student, stored, 2 * IMAGES, 2 * IMAGES + HELD_OUT)
            loss.lead.append(float(stored["teacher_held_out"]) - known)
    return {
        **{name: asked[name] for name in ("loss", "epochs", "seed", "student", "cache")},
        "accuracy": accuracy(student, stored, IMAGES, 2 * IMAGES),
        "train_accuracy": accuracy(student, stored, 0, IMAGES),
        "scales": loss.scales(0.0),
        "gradients": record,
        "seconds": time.perf_counter() - started,
    }


def recorded(
    step: int,
    terms: Mapping[str, Tensor],
    in_student: Mapping[str, Tensor],
    others: list[nn.Parameter],
    loss: Loss,
    progress: float,
) -> dict[str, Any]:
    """Return what is written of the gradients at a step, each times its weight."""
    scales = loss.scales(progress)
    line: dict[str, Any] = {"step": step}
    for name, vector in in_student.items():
        in_adapter = gradient(terms[name], others).norm() if others and name != loss.labels else 0.0
        line[name] = {
            "value": float(terms[name].detach()),
            "student": scales[name] * float(vector.norm()),
            "adapter": scales[name] * float(in_adapter),
            "cosine": float(F.cosine_similarity(vector, in_student[loss.labels], dim=0)),
        }
    return line


def batches(
    stored: Mapping[str, Tensor], seed: int, epoch: int, tap: FeatureTap, needs_maps: bool
) -> Iterator[Batch]:
    """Yield the batches of an epoch, the student's forward pass done."""
    random = torch.Generator().manual_seed(1000 * seed + epoch)
    order = torch.randperm(IMAGES, generator=random)
    view = (torch.rand(IMAGES, generator=random) < 0.5).long()
    tap.model.train()
    for rows in order[: IMAGES // BATCH * BATCH].split(BATCH):
        seen_BCHW, of_view = inputs(stored["pixels"][rows]), view[rows]
        seen_BCHW[of_view == 1] = seen_BCHW[of_view == 1].flip(3)
        logits_BK, features = tap(seen_BCHW.to(memory_format=torch.channels_last))
        yield Batch(
            stored["labels"][rows],
            logits_BK,
            stored["logits"][rows, of_view],
            features,
            {level: stored[f"map {level}"][rows, of_view].float() for level in LEVELS}
            if needs_maps
            else {},
        )


@torch.no_grad()
def accuracy(student: nn.Module, stored: Mapping[str, Tensor], begin: int, end: int) -> float:
    """Return the share of images of a range that a student has right."""
    student.eval()
    right = 0
    for rows in torch.arange(begin, end).split(500):
        found = student(inputs(stored["pixels"][rows]).to(memory_format=torch.channels_last))
        right += int((found.argmax(1) == stored["labels"][rows]).sum())
    return right / (end - begin)


def run(asked: argparse.Namespace) -> None:
    """Train what is asked for and is not in the results yet."""
    run_missing(
        run_one,
        [
            {
                "path": asked.cache,
                "cache": Path(asked.cache).stem,
                "student": asked.student,
                "loss": loss,
                "epochs": epochs,
                "seed": seed,
            }
            for epochs in asked.epochs
            for seed in asked.seeds
            for loss in asked.losses
        ],
        Path(asked.results),
        key=("cache", "student", "loss", "epochs", "seed"),
        at_once=asked.at_once,
        describe=lambda line: (
            f"{line['accuracy']:.4f} {line['epochs']:3d} epochs, seed {line['seed']},"
            f" {line['seconds']:4.0f} s: {line['loss']}"
        ),
    )


def table(asked: argparse.Namespace) -> None:
    """Print mean and deviation of each loss, by length."""
    scores: dict[tuple[str, str, str], dict[int, list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for one in read_lines(Path(asked.results)):
        scores[one["cache"], one["student"], one["loss"]][one["epochs"]].append(one["accuracy"])
    lengths = sorted({length for row in scores.values() for length in row})
    print("| teacher, student | loss |" + "".join(f" {n} epochs |" for n in lengths))
    print("| --- | --- |" + " --- |" * len(lengths))
    rows = sorted(
        scores.items(),
        key=lambda item: (item[0][:2], -max(map(statistics.fmean, item[1].values()))),
    )
    for (cache, student, loss), row in rows:
        cells = []
        for length in lengths:
            found = row.get(length, [])
            spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
            cells.append(
                f" {statistics.fmean(found):.3f}{spread} ({len(found)}) |" if found else " |"
            )
        print(f"| {cache}, {student} | `{loss}` |" + "".join(cells))


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare")
    preparing.add_argument("source", help="Parquet file of CIFAR-10")
    preparing.add_argument(
        "teacher", help="published weights (.th), or the name of a model to train"
    )
    preparing.add_argument("cache")
    preparing.add_argument("--teacher-epochs", type=int, default=5)
    running = commands.add_parser("run")
    running.add_argument("cache")
    running.add_argument("results")
    running.add_argument("--losses", nargs="+", required=True)
    running.add_argument("--student", default="resnet8")
    running.add_argument("--epochs", type=int, nargs="+", default=[10])
    running.add_argument("--seeds", type=int, nargs="+", default=[0])
    running.add_argument("--at-once", type=int, default=2)
    showing = commands.add_parser("table")
    showing.add_argument("results")
    asked = parser.parse_args()
    if asked.command == "prepare":
        prepare(asked.source, asked.teacher, asked.cache, asked.teacher_epochs)
    elif asked.command == "run":
        run(asked)
    else:
        table(asked)


if __name__ == "__main__":
    main()
