"""Results as tables for people; each fits a terminal of 80 columns."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from raygkd.errors import brief
from raygkd.metrics.metric import registered_metrics
from raygkd.metrics.ranking import rank
from raygkd.models import short_name

# rows of a table of classes
MAX_CLASSES = 40
STATUS_STYLES = {"ok": "green", "note": "yellow", "fix": "bold red"}


def show(value: Any) -> str:
    """Return a setting as short text, a number with three significant digits."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)


def trials_table(trials: Sequence[Mapping[str, Any]]) -> Table:
    """Return the trials of a search, best first.

    All settings of a trial share a column. Each has the same width in every row of trials with the
    same settings, so that they stay aligned, even if the column wraps.

    Args:
        trials: "params", "epochs", "val_score" (None if missing) and "status" of each.
    """
    table = new_table("Trials by validation score")
    for name in ("#", "val score", "epochs", "status"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("settings")
    for place, (trial, row) in enumerate(zip(trials, _settings(trials), strict=True), start=1):
        score = "-" if trial["val_score"] is None else f"{trial['val_score']:.4f}"
        row = f"{row}: {brief(error, quoted=False)}" if (error := trial.get("error")) else row
        table.add_row(str(place), score, str(trial["epochs"]), trial["status"], row)
    return table


def _settings(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the settings of each trial; those with the same names are aligned."""
    rows = [
        {
            name: f"{name}={short_name(value) if name == 'student' else show(value)}"
            for name, value in trial["params"].items()
        }
        for trial in trials
    ]
    lines = []
    for row in rows:
        alike = [other for other in rows if other.keys() == row.keys()]
        widths = [max(len(other[name]) for other in alike) for name in row]
        lines.append(" ".join(map(str.ljust, row.values(), widths)))
    return lines


def jobs_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the jobs of a cluster.

    Args:
        rows: "job", "status", "command" and "started" (milliseconds since 1970, or None) of each.
    """
    table = new_table("Jobs")
    table.add_column("job", overflow="fold")
    table.add_column("status", no_wrap=True)
    table.add_column("started", no_wrap=True)
    table.add_column("command", overflow="fold")
    for row in rows:
        moment = datetime.datetime.fromtimestamp((row["started"] or 0) / 1000)
        started = f"{moment:%Y-%m-%d %H:%M}" if row["started"] else "-"
        table.add_row(row["job"], row["status"].lower(), started, row["command"])
    return table


def models_table(
    rows: Sequence[tuple[str, str, int, float | None]], images: int | None = None
) -> Table:
    """Return models side by side.

    Args:
        rows: (role, model, parameters, score); None for a model that was not scored.
        images: number of test images, if known.
    """
    of = f"{images:,} images of " if images else ""
    table = new_table(f"Models on {of}the test split")
    table.add_column("")
    table.add_column("model", overflow="fold")
    for name in ("parameters", "size", "test score"):
        table.add_column(name, justify="right", no_wrap=True)
    largest = max(parameters for _, _, parameters, _ in rows)
    for role, model, parameters, score in rows:
        share = f"{100 * parameters / largest:.0f}%"
        table.add_row(role, model, f"{parameters:,}", share, score_text(score))
    return table


def score_text(score: float | None) -> str:
    """Return a score with four decimals; "-" where there is none."""
    return "-" if score is None else f"{score:.4f}"


# scores of a student that a teacher cannot improve
PERFECT = 0.99


def teacher_note(teacher: float | None, alone: float | None, score: str = "accuracy") -> str | None:
    """Return a note if the teacher is no better than the student alone on the test split.

    If the student alone is nearly perfect, a better teacher would not help.

    Args:
        teacher: its score, if it has one.
        alone: that of the student alone, if known.
        score: what the scores are.
    """
    if teacher is None or alone is None or rank(teacher, score) > rank(alone, score):
        return None
    if rank(alone, score) >= PERFECT:
        return (
            f"The student alone ({alone:.4f}) needs no teacher ({teacher:.4f}): these images are "
            "easy for it, or the test images are too few to show a difference."
        )
    return (
        f"The teacher ({teacher:.4f}) is no better than the student alone ({alone:.4f}), so there "
        "is little to learn from it; use a better one, or train it longer (--teacher-epochs; if "
        "its weights are pretrained, --teacher-mode finetune)."
    )


def champion_note(champion: Mapping[str, Any]) -> str | None:
    """Return a note if validation ranks the student alone before the best trial.

    Args:
        champion: see ``raygkd.workflows.champion``.
    """
    if champion["role"] == "best":
        return None
    return (
        f"The student alone is the champion: validation ranks it ({champion['val_score']:.4f}) "
        f"ahead of the best trial ({champion['beaten']:.4f}). model.pt is the student alone; the "
        "best trial's student is best-student/model.pt in the run's folder."
    )


def repeat_table(model: str, repeat: Mapping[str, Any]) -> Table:
    """Return the scores over several seeds, and the lead of the best settings.

    Args:
        model: name of the student.
        repeat: "models", role -> "test_scores", "mean" and "std", and "best_minus", role ->
            "differences", "mean" and "std"; None for a missing score and
            the numbers that depend on it.
    """
    table = new_table("Other seeds, on the test split")
    table.add_column("")
    table.add_column("model", overflow="fold")
    for name in ("seeds", "mean", "std"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = [
        (role, model, entry["test_scores"], entry, "") for role, entry in repeat["models"].items()
    ]
    rows += [
        (f"best - {role}", "", entry["differences"], entry, "+")
        for role, entry in repeat["best_minus"].items()
    ]
    for role, name, scores, entry, sign in rows:
        mean = "-" if entry["mean"] is None else f"{entry['mean']:{sign}z.4f}"
        std = "-" if entry["std"] is None else f"{entry['std']:.4f}"
        table.add_row(role.replace("_", " "), name, _seeds(scores), mean, std)
    return table


# heads of the columns of a comparison
COMPARED = ("method", "mean", "std", "seeds", "p", "step", "memory")


def comparison_rows(comparison: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the cells of a comparison, one row per method.

    Args:
        comparison: "seeds" and "methods", best first, each with "method", "scores", "mean", "std",
            "p_value" (None where there is none), "seconds_per_step" and its "step_ratio" to the
            student alone, "peak_mb" and its "peak_ratio".
    """
    return [
        (
            one["method"],
            "-" if one["mean"] is None else f"{one['mean']:.4f}",
            "-" if one["std"] is None else f"{one['std']:.4f}",
            _seeds(one["scores"]),
            "-" if one["p_value"] is None else f"{one['p_value']:.3f}",
            f"{1000 * one['seconds_per_step']:.0f} ms {one['step_ratio']:.2f}x",
            f"{one['peak_mb']:.0f} MiB {one['peak_ratio']:.2f}x",
        )
        for one in comparison["methods"]
    ]


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """Return methods, best mean first; see ``comparison_rows``."""
    table = new_table("Methods on the test split")
    table.add_column("#", justify="right", no_wrap=True)
    for name in COMPARED:
        left = name == "method"
        table.add_column(name, justify="left" if left else "right", no_wrap=not left)
    for place, cells in enumerate(comparison_rows(comparison), start=1):
        table.add_row(str(place), *cells)
    return table


def comparison_note(comparison: Mapping[str, Any]) -> str:
    """Return the meaning of a comparison's columns."""
    first, last = comparison["seeds"][0], comparison["seeds"][-1]
    return (
        f"{comparison['metric']}, mean and standard deviation over the seeds {first} to {last}; "
        f"p: paired t-test over the seeds against {comparison['reference']}; step time and memory "
        "per training process, and their ratio to the student alone"
    )


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """Return a comparison as a Markdown table, for a run's description in MLflow."""
    lines = [
        f"| # | {' | '.join(COMPARED)} |",
        "| --- " * (len(COMPARED) + 1) + "|",
        *(
            f"| {place} | {' | '.join(cells)} |"
            for place, cells in enumerate(comparison_rows(comparison), start=1)
        ),
    ]
    return "\n".join(lines) + f"\n\n{comparison_note(comparison)}"


def _seeds(scores: Sequence[float | None]) -> str:
    """Return the number of known scores, and of all if some are missing."""
    known = sum(score is not None for score in scores)
    return str(known) if known == len(scores) else f"{known} of {len(scores)}"


def search_markdown(
    models: Mapping[str, Mapping[str, Any]], params: Mapping[str, Any], verdict: str | None
) -> str:
    """Return a search's models and its best settings as Markdown, for its description in MLflow.

    Args:
        models: role -> "model", "parameters" and "test_score".
        params: of the best trial.
        verdict: the line of the verdict, if there is one.
    """
    rows = [
        f"| {role.replace('_', ' ')} | {one['model']} | {one['parameters']:,} | "
        f"{score_text(one['test_score'])} |"
        for role, one in models.items()
    ]
    settings = ", ".join(f"{name} {show(value)}" for name, value in params.items())
    head = ["| | model | parameters | test score |", "| --- | --- | --- | --- |"]
    text = "\n".join([*head, *rows]) + f"\n\nBest settings: {settings}."
    return f"{text}\n\n{verdict}" if verdict else text


def missing_scores(repeat: Mapping[str, Any]) -> list[str]:
    """Return a line for each repeat that has no score, with the reason.

    Args:
        repeat: "trials" with "role", "seed", "status" and "error" of each.
    """
    return [
        f"no score of {trial['role'].replace('_', ' ')} with seed {trial['seed']}: "
        f"{trial['error'] or trial['status']}"
        for trial in repeat["trials"]
        if trial["status"] != "finished"
    ]


def levels_table(rows: Sequence[Mapping[str, Any]], pairs: Mapping[int, int]) -> Table:
    """Return the matched levels.

    Args:
        rows: from ``GraphDistillationLoss.describe``, under the student's levels.
        pairs: level of the student -> level of the teacher.
    """
    table = new_table("Matched levels, student:teacher")
    for name in ("levels", "student CxHxW", "teacher CxHxW", "grid", "adapter", "pairs"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        shapes = [
            "x".join(map(str, row[key])) for key in ("student_shape", "teacher_shape", "grid")
        ]
        spectral_pairs = f"{row['spectral_pairs']} of {row['spectral_dim']}"
        levels = f"{row['level']}:{pairs[row['level']]}"
        table.add_row(levels, *shapes, row["adapter"], spectral_pairs)
    return table


def doctor_table(checks: Sequence[Mapping[str, str]]) -> Table:
    """Return the findings of ``raygkd.workflows.doctor``.

    Args:
        checks: "check", "status", "found" and "advice" of each.
    """
    table = new_table("This installation")
    table.add_column("check", overflow="fold")
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("what to do", overflow="fold")
    for row in checks:
        status = Text(row["status"], style=STATUS_STYLES[row["status"]])
        table.add_row(row["check"], status, row["found"], row["advice"])
    return table


def evaluation_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the result of ``raygkd.workflows.evaluate``: a table of models, and one of classes."""
    models = result["models"]
    whole = new_table(f"Models on {result['images']:,} images of the {result['split']} split")
    by_class = new_table("By class")
    for table in (whole, by_class):
        table.add_column("")
        for given in models:
            table.add_column(given, justify="right", overflow="fold")
    for label, cells in _evaluation_rows(result):
        whole.add_row(label, *cells)
    key = "per_class50" if "per_class50" in next(iter(models.values()))["scores"] else "per_class"
    columns = [one["scores"][key] for one in models.values()]
    names = result["class_names"]
    for name, row in itertools.islice(zip(names, zip(*columns)), MAX_CLASSES):
        by_class.add_row(name, *("-" if score is None else f"{score:.4f}" for score in row))
    if len(names) > MAX_CLASSES:
        by_class.add_row(f"and {len(names) - MAX_CLASSES:,} more (--json has all)")
    return [whole, by_class]


def _evaluation_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yield the label of each fact and its text for each model."""
    models = list(result["models"].values())
    yield "model", [one["model"] for one in models]
    yield result["measure"], [f"{one['scores']['score']:.4f}" for one in models]
    if "top5" in models[0]["scores"]:
        yield "top-5 accuracy", [f"{one['scores']['top5']:.4f}" for one in models]
    for name, metric in registered_metrics().items():
        if name in models[0]["scores"] and name != result["measure"]:
            yield metric.label(), [format(one["scores"][name], metric.form) for one in models]
    yield "calibration error", [_number(one["calibration"]["ece"], ".4f") for one in models]
    yield "parameters", [_number(one["parameters"], ",") for one in models]
    yield "file size, bytes", [f"{one['bytes']:,}" for one in models]
    mega = [None if one["flops"] is None else one["flops"] / 1e6 for one in models]
    yield "MFLOPs per image", [_number(value, ",.1f") for value in mega]
    for size in models[0]["latency_ms"]:
        timed = [one["latency_ms"][size] for one in models]
        texts = [f"{of['median']:.2f} (p95 {of['p95']:.2f})" for of in timed]
        yield f"ms, batch of {size}", texts
    for size in models[0]["latency_ms"]:
        peaks = [None if one["memory_mb"] is None else one["memory_mb"][size] for one in models]
        yield f"MiB, batch of {size}", [_number(peak, ",.1f") for peak in peaks]
    yield "hardware", [one["hardware"].partition(",")[0] for one in models]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def promotion_table(result: Mapping[str, Any]) -> Table:
    """Return the versions compared by ``raygkd.workflows.promote``."""
    table = new_table(f"{result['name']} on {result['images']:,} test images")
    table.add_column("")
    table.add_column("version", justify="right")
    table.add_column("model", overflow="fold")
    for name in ("parameters", result["measure"]):
        table.add_column(name, justify="right", no_wrap=True)
    for role, one in result["versions"].items():
        score = f"{one['test_score']:.4f}"
        table.add_row(role, one["version"], one["model"], f"{one['parameters']:,}", score)
    return table


def promotion_note(result: Mapping[str, Any]) -> list[str]:
    """Return the outcome and any caveat, one line each."""
    champion, challenger = (result["versions"][role]["version"] for role in result["versions"])
    ahead, margin = f"{result['difference']:+z.4f}", f"{result['margin']:g}"
    if result["promoted"]:
        done = f"version {challenger} is the champion now: {ahead}, margin {margin}"
    else:
        done = f"version {champion} stays the champion: {ahead} does not reach the margin {margin}"
        if not result["margin"]:
            done = f"version {champion} stays the champion: {ahead} is not an improvement"
    note = (
        "the two runs used different images or splits, so one may have been trained on these test "
        "images: compare on --data that neither has seen"
    )
    return [done] if result["same_splits"] else [done, note]


def info_table(info: Mapping[str, Any]) -> Table:
    """Return the result of ``raygkd.data.inspect.table_info``, one fact per line."""
    table = new_table("Images", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("path", info["path"])
    table.add_row("data set", info["dataset"] or "- (not prepared by raygkd)")
    table.add_row("images", f"{info['images']:,} ({_counts(info['splits'])})")
    if info["unlabelled"]:
        table.add_row("without a label", f"{info['unlabelled']:,}")
    table.add_row("files", f"{info['files']:,} with {info['bytes']:,} bytes")
    table.add_row("sampled", f"{info['sampled']:,} images ({_counts(info['formats'])})")
    table.add_row("unreadable", f"{info['bad']:,} of those")
    for name in ("width", "height"):
        spread = ", ".join(f"{key} {value:g}" for key, value in info[name].items())
        table.add_row(name, f"{spread} pixels" if spread else "-")
    for warning in info["warnings"]:
        table.add_row("warning", warning)
    return table


def classes_table(classes: Mapping[str, Mapping[str, int]]) -> Table:
    """Return the number of images per class; classes beyond ``MAX_CLASSES`` are only counted.

    Args:
        classes: class name -> split -> images.
    """
    table = new_table(f"{len(classes):,} classes")
    table.add_column("class", overflow="fold")
    for split in next(iter(classes.values())):
        table.add_column(split, justify="right", no_wrap=True)
    for name, counts in itertools.islice(classes.items(), MAX_CLASSES):
        table.add_row(name, *(f"{count:,}" for count in counts.values()))
    if len(classes) > MAX_CLASSES:
        table.add_row(f"and {len(classes) - MAX_CLASSES:,} more (--json has all)")
    return table


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def new_table(title: str, *, show_header: bool = True) -> Table:
    """Return an empty table in the look that all share."""
    return Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        show_header=show_header,
    )
