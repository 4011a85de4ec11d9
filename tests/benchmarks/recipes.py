"""Candidate recipes at equal length: one teacher, one student, a JSON line for each run.

    raygkd teacher --teacher resnet20 --dataset cluttered-digits --epochs 20 --name r20 --output out
    python tests/benchmarks/recipes.py run out/runs/teacher-r20/model.pt results.jsonl \\
        --dataset cluttered-digits --epochs 10 30 --seeds 0 1
    python tests/benchmarks/recipes.py table results.jsonl

A candidate is a set of settings beside the defaults. Every candidate trains the same student with
the same images, order and number of epochs, and is chosen by its score on validation images; the
test score is written beside it. A run takes one thread; ``--at-once`` go at a time, and those that
the file of results has are skipped. ``--data-dir`` is that of a data set that needs one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from run_pool import read_lines, run_missing

from raygkd.assembly.recipes import views_of
from raygkd.assembly.training import build_training
from raygkd.config import Config, with_settings
from raygkd.data import PlainStream
from raygkd.data.run_images import open_images
from raygkd.data.splits import Splits
from raygkd.engine import evaluate, run_epoch
from raygkd.models import load_model_file
from raygkd.storage.atomic_files import place

# name -> settings that differ from the defaults
CANDIDATES: dict[str, dict[str, Any]] = {
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


def run_one(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Train one student and return its line."""
    torch.set_num_threads(1)
    settings = {
        "dataset": asked["dataset"],
        "data_dir": asked["data_dir"],
        "limit_train": asked["limit_train"],
        "student": asked["student"],
        "method": asked["method"],
        "epochs": asked["epochs"],
        "seed": asked["seed"],
        **CANDIDATES[asked["candidate"]],
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
            for candidate in asked.candidates
        ],
        Path(asked.results),
        key=("dataset", "candidate", "epochs", "seed", "student", "method"),
        at_once=asked.at_once,
        describe=lambda line: (
            f"{line['val_score']:.4f} (test {line['test_score']:.4f}) {line['epochs']:3d} "
            f"epochs, seed {line['seed']}, {line['seconds']:4.0f} s: {line['candidate']}"
        ),
    )


def table(asked: argparse.Namespace) -> None:
    """Print mean and deviation of each candidate on validation images, and the test's mean."""
    rows: dict[tuple[str, str], dict[int, list[dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for line in read_lines(Path(asked.results)):
        rows[line["dataset"], line["candidate"]][line["epochs"]].append(line)
    lengths = sorted({length for row in rows.values() for length in row})
    print("| images | recipe |" + "".join(f" {n} epochs |" for n in lengths))
    print("| --- | --- |" + " --- |" * len(lengths))
    for (dataset, candidate), row in rows.items():
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
        print(f"| `{dataset}` | {candidate} |" + "".join(cells))


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
    running.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    running.add_argument("--epochs", type=int, nargs="+", default=[10])
    running.add_argument("--seeds", type=int, nargs="+", default=[0])
    running.add_argument("--at-once", type=int, default=2)
    showing = commands.add_parser("table")
    showing.add_argument("results")
    asked = parser.parse_args()
    if asked.command == "run":
        run(asked)
    else:
        table(asked)


if __name__ == "__main__":
    main()
