"""What a search saves by stopping trials early, and what a trial costs to start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from raygkd.bench.rows import Row, Rows
from raygkd.config import Config, with_settings
from raygkd.workflows import tune

# what a student on 8 x 8 digits learns in seconds
SETTINGS = {
    "dataset": "digits",
    "teacher": "resnet20",
    "student": "resnet8",
    "teacher_epochs": 3,
    "cpus_per_worker": 1.0,
}
SIZE = {"trials": 64, "epochs": 27}
QUICK_SIZE = {"trials": 16, "epochs": 9, "limit_train": 256}


def search_rows(folder: Path, nested_seconds: float, *, quick: bool) -> Rows:
    """Yield what ASHA trains of what all trials would, what it finds, and the start of a trial.

    Args:
        folder: for the runs.
        nested_seconds: that a trial takes to its first step through a trainer of its own.
        quick: fewer and shorter trials.
    """
    size = (
        {"trials": 16, "epochs": 9, "limit_train": 256} if quick else {"trials": 64, "epochs": 27}
    )
    asha, full = (_search(folder, scheduler, size) for scheduler in ("asha", "none"))
    searches = {"asha": asha, "full": full}
    trained = {name: one["selection"]["trained_epochs"] for name, one in searches.items()}
    scores = {name: one["best"]["val_score"] for name, one in searches.items()}
    configuration = {**SETTINGS, **size}
    what = f"ASHA search of {size['trials']} trials of at most {size['epochs']} epochs"
    against = f"{size['trials']} full trials"
    yield Row(
        what=f"epochs of an {what}",
        against=against,
        value=100 * trained["asha"] / trained["full"],
        unit="%",
        bound=30.0,
        configuration={**configuration, "epochs trained": trained},
    )
    yield Row(
        what="best validation score that it misses",
        against=against,
        value=100 * (scores["full"] - scores["asha"]),
        unit="points",
        bound=0.5,
        configuration={**configuration, "scores": scores},
    )
    yield Row(
        what="start of a warm trial, to its first step",
        against=f"TorchTrainer in a trial: {nested_seconds:.1f} s",
        value=asha["selection"]["first_step_seconds"],
        unit="s",
        bound=1.0,
        configuration={**configuration, "nested seconds": nested_seconds},
    )


def _search(folder: Path, scheduler: str, size: dict[str, int]) -> dict[str, Any]:
    settings = {**SETTINGS, **size, "scheduler": scheduler, "output": str(folder)}
    return tune(with_settings(Config(), settings), console=Console(quiet=True))
