"""Print results on the console."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raygkd.errors import to_paste


def show_search(out: Any, result: dict[str, Any]) -> None:
    """Print the result of ``raygkd tune``."""
    from raygkd.report.students import students_table
    from raygkd.report.tables import (
        champion_note,
        missing_scores,
        models_table,
        repeat_table,
        teacher_note,
        trials_table,
    )

    # without labels no student is trained alone
    best, alone, teacher = result["best"], result.get("student_alone"), result["teacher"]
    shown = {"teacher": teacher, "student alone": alone, "best student": best}
    rows = [
        (role, model["model"], model["parameters"], model["test_score"])
        for role, model in shown.items()
        if model is not None
    ]
    out.print(trials_table(result["trials"]))
    if result["students"] is not None:
        out.print(students_table(result["students"]))
    out.print(models_table(rows, result.get("test_images")))
    score = result["selection"]["score"]
    if alone and (note := teacher_note(teacher["test_score"], alone["test_score"], score)):
        out.print(note, soft_wrap=True)
    if note := champion_note(result["champion"]):
        out.print(note, soft_wrap=True)
    if result["repeat"] is not None:
        out.print(repeat_table(best["model"], result["repeat"]))
        for line in missing_scores(result["repeat"]):
            out.print(line, soft_wrap=True)
    out.print(f"curves      {result['run']}/search.png", soft_wrap=True)
    if result["students"] is not None:
        out.print(f"students    {result['run']}/front.png", soft_wrap=True)
    _show_registered(out, result)
    _show_next(out, result)
    _show_verdict(out, result)


def show_comparison(out: Any, result: dict[str, Any]) -> None:
    """Print the result of ``raygkd compare``."""
    from raygkd.report.tables import comparison_note, comparison_table, models_table, teacher_note

    comparison, models = result["comparison"], result["models"]
    out.print(comparison_table(comparison))
    out.print(comparison_note(comparison), soft_wrap=True)
    rows = [
        (role, model["model"], model["parameters"], model["test_score"])
        for role, model in models.items()
    ]
    if rows:
        out.print(models_table(rows, result.get("test_images")))
    means = {one["method"]: one["mean"] for one in comparison["methods"]}
    if "teacher" in models and (
        note := teacher_note(
            models["teacher"]["test_score"], means.get("none"), comparison["metric"]
        )
    ):
        out.print(note, soft_wrap=True)
    out.print(f"picture     {result['run']}/comparison.png", soft_wrap=True)
    _show_next(out, result)
    _show_verdict(out, result)


def show_single(out: Any, result: dict[str, Any]) -> None:
    """Print the result of ``raygkd train`` or ``raygkd teacher``."""
    from raygkd.report.export_tables import int8_table
    from raygkd.report.tables import models_table

    rows = [
        (role, model["model"], model["parameters"], model["test_score"])
        for role, model in result["models"].items()
    ]
    out.print(models_table(rows, result.get("test_images")))
    name = _score_name(result["score"])
    out.print(f"validation score {result['val_score']:.4f}{name}", soft_wrap=True)
    _show_next(out, result)
    if "next" in result:
        out.print(f"next        {result['next']}", soft_wrap=True)
    if result["int8"] is not None:
        out.print(int8_table(result["int8"]["scores"]))
        for other in ("float", "calibrated"):
            out.print(result["int8"][f"against_{other}"]["line"], soft_wrap=True)
    if result["verdict"] is not None:
        out.print(result["verdict"]["line"], soft_wrap=True)


def _score_name(score: str) -> str:
    """Return the name of a score in brackets, unless it is the usual one of a task."""
    from raygkd.metrics.ranking import NEAREST, WITHOUT_LABELS

    title = {**NEAREST, **WITHOUT_LABELS}.get(score)
    return f" ({title})" if title else ""


def _show_registered(out: Any, result: dict[str, Any]) -> None:
    """Print the version of the champion, and the command that promotes it."""
    registered = result["champion"]["registered"]
    if registered is None:
        return
    name, alias = registered["name"], registered["alias"]
    out.print(
        f"registered  models:/{name}@{alias}, version {registered['version']}", soft_wrap=True
    )
    if alias == "challenger":
        uri = result["mlflow"]["tracking_uri"]
        local = uri.startswith("sqlite")
        store = ("--output", Path(result["run"]).parents[1]) if local else ("--tracking-uri", uri)
        out.print(f"promote     {to_paste('promote', name, *store)}", soft_wrap=True)


def _show_verdict(out: Any, result: dict[str, Any]) -> None:
    """Print whether distillation has improved the student, as the last line."""
    if result["verdict"] is not None:
        out.print(result["verdict"]["line"], soft_wrap=True)
    elif "comparison" in result:
        out.print(
            "no verdict: it needs the student alone (none in --methods) and a distilled student, "
            "each with a score for every seed",
            soft_wrap=True,
        )


def _show_next(out: Any, result: dict[str, Any]) -> None:
    run = result["run"]
    out.print(f"model file  {run}/model.pt", soft_wrap=True)
    out.print(f"results     {run}/result.json", soft_wrap=True)
    uri = result["mlflow"]["tracking_uri"]
    if uri.startswith("sqlite"):
        output = Path(run).parent.parent
        out.print(f"compare     {to_paste('ui', '--output', output)}", soft_wrap=True)
    else:
        out.print(f"compare     {uri}", soft_wrap=True)
