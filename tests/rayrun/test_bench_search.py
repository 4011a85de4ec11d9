"""What raygkd bench tells of a search: ASHA over trials that were trained to their end."""

from __future__ import annotations

import json
from pathlib import Path

from raygkd.bench.search_rows import Curve, asha
from raygkd.config import Config, with_settings
from raygkd.rayrun.search_history import read_epochs

EPOCHS = 9


def curve(score: float, epochs: int = EPOCHS, diverged: bool = False) -> Curve:
    """Return a trial that scores alike in all of its epochs."""
    told = [{"epoch": float(n), "val_score": score, "diverged": 0.0} for n in range(1, epochs + 1)]
    told[-1]["diverged"] = float(diverged)
    return told


def test_asha_trains_on_what_is_ahead_and_no_more(tmp_path: Path) -> None:
    curves = [curve(0.5), curve(0.4), curve(0.9), curve(0.1), curve(0.6, epochs=2, diverged=True)]
    curves += [curve(0.2), curve(0.95)]
    config = with_settings(Config(), {"trials": len(curves), "epochs": EPOCHS})
    trials = asha(curves, config, tmp_path)
    assert [trial.epoch for trial in trials] == [9, 1, 9, 1, 2, 1, 9]
    statuses = [trial.status for trial in trials]
    assert statuses == [
        "finished",
        "stopped",
        "finished",
        "stopped",
        "diverged",
        "stopped",
        "finished",
    ]


def test_curves_are_those_of_the_journal(tmp_path: Path) -> None:
    curves = [curve(0.5), curve(0.6, epochs=2, diverged=True)]
    events = [{"trial": 0, "params": {}}, {"trial": 1, "params": {}}]
    events += [{"trial": 1, "metrics": metrics} for metrics in curves[1]]
    events += [{"trial": 0, "metrics": metrics} for metrics in curves[0]]
    journal = tmp_path / "trials.jsonl"
    journal.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert read_epochs(journal) == dict(enumerate(curves))
