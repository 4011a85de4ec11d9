"""Draw docs/images/results.svg: python tests/benchmarks/plot_results.py."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PICTURE = HERE.parents[1] / "docs" / "images" / "results.svg"
# label -> colour, and losses in the file: the first that was run for a number of epochs
CURVES = {
    "graph (default)": ("#1b7f79", ["3@vertex:fall=lead4"]),
    "fitnet": ("#b5651d", ["3@fitnet", "1@fitnet"]),
    "kd": ("#6a5acd", ["0.1*labels+0.9*kd"]),
    "student alone": ("#777777", ["none"]),
}
EPOCHS = (5, 10, 20, 60)


def accuracies(losses: list[str]) -> dict[int, list[float]]:
    """Return number of epochs -> accuracies of all seeds."""
    lines = (HERE / "strong_teacher.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    found: dict[int, list[float]] = {}
    for epochs in EPOCHS:
        for loss in losses:
            scores = [run["accuracy"] for run in runs if _matches(run, loss, epochs)]
            if scores and epochs not in found:
                found[epochs] = scores
    return found


def _matches(run: dict[str, object], loss: str, epochs: int) -> bool:
    wanted = {"loss": loss, "epochs": epochs, "student": "resnet8", "cache": "published"}
    return all(run[name] == value for name, value in wanted.items())


def draw() -> None:
    """Write the picture."""
    mpl.rcParams.update({"svg.hashsalt": "raygkd", "svg.fonttype": "none", "font.size": 11})
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for label, (colour, losses) in CURVES.items():
        seeds = accuracies(losses)
        means = [statistics.mean(scores) for scores in seeds.values()]
        spread = [statistics.stdev(s) if len(s) > 1 else 0.0 for s in seeds.values()]
        style = {"color": colour, "marker": "o", "capsize": 3, "linewidth": 1.6}
        axes.errorbar(list(seeds), means, yerr=spread, label=label, **style)
    axes.set_xscale("log")
    axes.set_xticks(EPOCHS, [str(epochs) for epochs in EPOCHS])
    axes.minorticks_off()
    axes.set(xlabel="epochs (78 steps each)", ylabel="accuracy")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, ncols=2, loc="lower right")
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    draw()
