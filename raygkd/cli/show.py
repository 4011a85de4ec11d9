"""Print results on the console."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def show_search(out: Any, result: dict[str, Any]) -> None:
    """Print the result of ``raygkd tune``."""
    from raygkd.report.tables import (
        champion_note,
        missing_scores,
        models_table,
        repeat_table,
        teacher_note,
        trials_table,
    )

    best, alone, teacher = result["best"], result["student_alone"], result["teacher"]
    rows = [
        ("teacher", teacher["model"], teacher["parameters"], teacher["test_score"]),
        ("student alone", alone["model"], alone["parameters"], alone["test_score"]),
        ("best student", best["model"], best["parameters"], best["test_score"]),
    ]
    out.print(trials_table(result["trials"]))
    out.print(models_table(rows))
    score = result["selection"]["score"]
    if note := teacher_note(teacher["test_score"], alone["test_score"], score):
        out.print(note, soft_wrap=True)
    if note := champion_note(result["champion"]):
        out.print(note, soft_wrap=True)
    if result["repeat"] is not None:
        out.print(repeat_table(best["model"], result["repeat"]))
        for line in missing_scores(result["repeat"]):
            out.print(line, soft_wrap=True)
    out.print(f"curves      {result['run']}/search.png", soft_wrap=True)
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
        out.print(models_table(rows))
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
    from raygkd.report.tables import models_table

    rows = [
        (role, model["model"], model["parameters"], model["test_score"])
        for role, model in result["models"].items()
    ]
    out.print(models_table(rows))
    out.print(f"validation score {result['val_score']:.4f}")
    _show_next(out, result)


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
        store = f"--output {Path(result['run']).parents[1]}" if local else f"--tracking-uri {uri}"
        out.print(f"promote     raygkd promote {name} {store}", soft_wrap=True)


def _show_verdict(out: Any, result: dict[str, Any]) -> None:
    """Print whether distillation has paid, as the last line."""
    if result["verdict"] is not None:
        out.print(result["verdict"]["line"], soft_wrap=True)
    elif "comparison" in result:
        out.print(
            "no verdict: it takes scores of the student alone (none in --methods) and of a "
            "distilled student with all seeds",
            soft_wrap=True,
        )


def _show_next(out: Any, result: dict[str, Any]) -> None:
    run = result["run"]
    out.print(f"model file  {run}/model.pt", soft_wrap=True)
    out.print(f"all of it   {run}/result.json", soft_wrap=True)
    uri = result["mlflow"]["tracking_uri"]
    if uri.startswith("sqlite"):
        out.print(f"compare     raygkd ui --output {Path(run).parent.parent}", soft_wrap=True)
    else:
        out.print(f"compare     {uri}", soft_wrap=True)
