"""Candidate recipes at equal length: one teacher, one student, a JSON line for each run.

    raygkd teacher --teacher resnet20 --dataset cluttered-digits --epochs 20 --name r20 --output out
    python tests/benchmarks/recipes.py run out/runs/teacher-r20/model.pt results.jsonl \\
        --dataset cluttered-digits --epochs 10 30 --seeds 0 1
    python tests/benchmarks/recipes.py table results.jsonl

A candidate is a set of settings beside the defaults. Every candidate trains the same student with
the same images, order and number of epochs, and is chosen by its score on validation images; the
test score is written beside it. A run takes one thread; ``--at-once`` go at a time, and those that
the file of results has are skipped. ``--data-dir`` is that of a data set that needs one.

``--of finetuning`` compares optimisers for a student with pretrained weights. No weights are
needed from elsewhere: ``halves`` cuts a Parquet file in two by its classes, and a student that is
trained on one half is fine-tuned on a few images of the other.

    python tests/benchmarks/recipes.py halves cifar10.parquet source.parquet target.parquet
    raygkd teacher --teacher timm:test_vit --teacher-weights none --dataset parquet \\
        --data-dir source.parquet --image-size 64 --name source --output out
    python tests/benchmarks/recipes.py run TEACHER.pt results.jsonl --of finetuning --method none \\
        --dataset parquet --data-dir target.parquet --limit-train 1000 --image-size 64 \\
        --student timm:test_vit --student-weights out/runs/teacher-source/model.pt
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from run_pool import read_lines, run_missing

from raygkd.assembly.recipes import views_of
from raygkd.assembly.training import build_training
from raygkd.config import Config, with_settings
from raygkd.data import PlainStream
from raygkd.data.footers import FOREIGN_CLASSES_KEY
from raygkd.data.run_images import open_images
from raygkd.data.splits import Splits
from raygkd.engine import evaluate, run_epoch
from raygkd.models import load_model_file
from raygkd.storage.atomic_files import place

Candidates = dict[str, dict[str, Any]]
# name -> settings that differ from the defaults
RECIPES: Candidates = {
    "defaults": {},
    "batch 32": {"batch_size": 32},
    "lr 0.1": {"lr": 0.1},
    "ema": {"ema": 0.98},
    "label smoothing": {"label_smoothing": 0.1},
    "mixup": {"mixup": 0.2},
    "cutmix": {"cutmix": 1.0},
    "erase": {"erase": 0.25},
    "trivial-augment": {"trivial_augment": True},
    "randaugment": {"randaugment": True},
    "batch 32, ema": {"batch_size": 32, "ema": 0.98},
    "lr 0.1, ema": {"lr": 0.1, "ema": 0.98},
    "batch 32, mixup, ema": {"batch_size": 32, "mixup": 0.2, "ema": 0.98},
    "batch 32, trivial-augment, ema": {"batch_size": 32, "trivial_augment": True, "ema": 0.98},
}
_ADAMW = {"optimizer": "adamw", "lr": 1e-3}
_WARM = {**_ADAMW, "warmup_epochs": 1.0}
FINETUNING: Candidates = {
    **{f"sgd {lr}": {"lr": lr} for lr in (0.05, 0.015, 0.005, 0.0015)},
    "sgd 0.05, warm-up": {"warmup_epochs": 1.0},
    "sgd 0.05, backbone 0.1": {"backbone_lr_factor": 0.1},
    "sgd 0.05, one epoch frozen": {"freeze_epochs": 1},
    "sgd 0.05, batch norm frozen": {"freeze_batch_norm": True},
    **{f"adamw {lr}": {**_ADAMW, "lr": lr} for lr in (3e-3, 1e-3, 3e-4, 1e-4)},
    "adamw 0.001, warm-up": _WARM,
    "adamw 0.001, warm-up, weight decay 0.05": {**_WARM, "weight_decay": 0.05},
    "adamw 0.001, warm-up, backbone 0.1": {**_WARM, "backbone_lr_factor": 0.1},
    "adamw 0.001, warm-up, layer decay 0.75": {**_WARM, "layer_decay": 0.75},
    "adamw 0.001, one epoch frozen": {**_ADAMW, "freeze_epochs": 1},
}
CANDIDATES = {"recipes": RECIPES, "finetuning": FINETUNING}


def run_one(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Train one student and return its line."""
    torch.set_num_threads(1)
    settings = {
        "dataset": asked["dataset"],
        "data_dir": asked["data_dir"],
        "limit_train": asked["limit_train"],
        "image_size": asked["image_size"],
        "student": asked["student"],
        "student_weights": asked["student_weights"],
        "method": asked["method"],
        "epochs": asked["epochs"],
        "seed": asked["seed"],
        **CANDIDATES[asked["of"]][asked["candidate"]],
    }
    config = with_settings(Config(), settings)
    # the splits are the same for all seeds
    images = open_images(config.data, seed=0, output=place(asked["shards"]))
    stream = PlainStream(
        images.table,
        Splits(**{split: images.rows[split] for split in ("train", "val", "test")}),
        images.transform("train", views_of(config.recipe)),
        images.transform("val"),
        batch_size=config.optim.batch_size,
        seed=config.optim.seed,
    )
    training = build_training(
        config,
        spec=images.spec,
        teacher_file=load_model_file(asked["teacher"]),
        stream=stream,
        device=torch.device("cpu"),
    )
    started, scores = time.perf_counter(), []
    while not training.is_over:
        scores.append(run_epoch(training)["val_score"])
    return {
        **{name: asked[name] for name in ("dataset", "candidate", "epochs", "seed", "student")},
        "method": asked["method"],
        "val_score": scores[-1],
        "val_scores": scores,
        "test_score": evaluate(training, "test")["score"],
        "seconds": time.perf_counter() - started,
    }


def run(asked: argparse.Namespace) -> None:
    """Train what is asked for and is not in the results yet."""
    run_missing(
        run_one,
        [
            {**vars(asked), "epochs": epochs, "seed": seed, "candidate": candidate}
            for epochs in asked.epochs
            for seed in asked.seeds
            for candidate in asked.candidates or CANDIDATES[asked.of]
        ],
        Path(asked.results),
        key=("dataset", "candidate", "epochs", "seed", "student", "method"),
        at_once=asked.at_once,
        describe=lambda line: (
            f"{line['val_score']:.4f} (test {line['test_score']:.4f}) {line['epochs']:3d} "
            f"epochs, seed {line['seed']}, {line['seconds']:4.0f} s: {line['candidate']}"
        ),
    )


def halves(asked: argparse.Namespace) -> None:
    """Write the classes of even and of odd number of a Parquet file as two."""
    table = pq.read_table(asked.images)
    labels = table.column("label").to_numpy()
    names = table.schema.metadata[FOREIGN_CLASSES_KEY].decode().split(",")
    for odd, path in enumerate(asked.halves):
        rows = np.flatnonzero(labels % 2 == odd)
        part = table.take(rows).set_column(
            table.column_names.index("label"), "label", pa.array(labels[rows] // 2)
        )
        metadata = {FOREIGN_CLASSES_KEY: ",".join(names[odd::2])}
        pq.write_table(part.replace_schema_metadata(metadata), path, row_group_size=1000)


def table(asked: argparse.Namespace) -> None:
    """Print mean and deviation of each candidate on validation images, and the test's mean."""
    rows: dict[tuple[str, str], dict[int, list[dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for line in read_lines(Path(asked.results)):
        pair = f"{line['method']}, {line['student']}"
        rows[pair, line["candidate"]][line["epochs"]].append(line)
    lengths = sorted({length for row in rows.values() for length in row})
    print("| method, student | candidate |" + "".join(f" {n} epochs |" for n in lengths))
    print("| --- | --- |" + " --- |" * len(lengths))
    for (pair, candidate), row in rows.items():
        cells = []
        for length in lengths:
            scores = [line["val_score"] for line in row.get(length, [])]
            tests = [line["test_score"] for line in row.get(length, [])]
            if not scores:
                cells.append(" |")
                continue
            spread = f" ({statistics.stdev(scores):.3f})" if len(scores) > 1 else ""
            mean, test = statistics.fmean(scores), statistics.fmean(tests)
            cells.append(f" {mean:.3f}{spread}; {test:.3f} |")
        print(f"| {pair} | {candidate} |" + "".join(cells))


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("teacher", help="model file")
    running.add_argument("results")
    running.add_argument("--dataset", default="cluttered-digits")
    running.add_argument("--data-dir")
    running.add_argument("--limit-train", type=int)
    running.add_argument("--shards", default="raygkd-output", help="folder of prepared images")
    running.add_argument("--student", default="resnet8")
    running.add_argument("--method", default="graph")
    running.add_argument("--student-weights")
    running.add_argument("--image-size", type=int)
    running.add_argument("--of", choices=CANDIDATES, default="recipes")
    running.add_argument("--candidates", nargs="+", help="some of them; default: all")
    running.add_argument("--epochs", type=int, nargs="+", default=[10])
    running.add_argument("--seeds", type=int, nargs="+", default=[0])
    running.add_argument("--at-once", type=int, default=2)
    halving = commands.add_parser("halves")
    halving.add_argument("images", help="Parquet file")
    halving.add_argument("halves", nargs=2, help="Parquet files to write")
    showing = commands.add_parser("table")
    showing.add_argument("results")
    asked = parser.parse_args()
    if asked.command == "run":
        run(asked)
    elif asked.command == "halves":
        halves(asked)
    else:
        table(asked)


if __name__ == "__main__":
    main()
