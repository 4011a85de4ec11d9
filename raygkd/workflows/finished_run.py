"""A finished run, read from its folder."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raygkd.assembly.methods import matches_graphs, uses_teacher
from raygkd.assembly.models import is_model_file
from raygkd.config import Config, read_run_config, with_settings
from raygkd.data.run_images import Images
from raygkd.engine import read_checkpoint
from raygkd.errors import ConfigError, to_paste
from raygkd.metrics.ranking import rank
from raygkd.models import ModelFile, load_model_file
from raygkd.rayrun import search_history, worker
from raygkd.rayrun.search_history import Trial
from raygkd.rayrun.worker import CHECKPOINT, METRICS, trial_folder
from raygkd.storage.atomic_files import Place, modified, place
from raygkd.storage.journal import read_entries
from raygkd.tracking.journal_entries import read_journal
from raygkd.workflows import resume
from raygkd.workflows.results import (
    ALONE,
    BEST,
    BEST_STUDENT,
    STUDENT,
    STUDENT_ALONE,
    TEACHER,
)
from raygkd.workflows.resume import MODEL
from raygkd.workflows.run_files import read_facts, read_result
from raygkd.workflows.teachers import teacher_folder

# names of the models in a report, in its order
# of a result that ranks methods
COMPARISON = "comparison"


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """The training of one student of a run.

    Attributes:
        student: its name in a report.
        config: its settings.
        params: those of them that were searched.
        folder: of its last checkpoint, if that still exists.
    """

    student: str
    config: Config
    params: Mapping[str, Any]
    folder: Place

    def checkpoint(self) -> dict[str, Any] | None:
        """Return its last checkpoint; None if it no longer exists.

        Raises:
            DataError: it is damaged.
        """
        path = self.folder / CHECKPOINT
        return read_checkpoint(path) if path.exists() else None


@dataclass(frozen=True, kw_only=True, eq=False)
class FinishedRun:
    """A finished run: its settings, result and trials.

    Attributes:
        folder: of the run.
        output: the output folder that it is in.
        config: the settings of the command.
        result: what its ``--json`` printed.
        facts: the data and models it depends on, see ``raygkd.workflows.resume``.
        trials: of a search, best first.
        winner: the trial of the best student of a search or comparison.
    """

    folder: Place
    output: Place
    config: Config
    result: Mapping[str, Any]
    facts: Mapping[str, Any]
    trials: tuple[Trial, ...]
    winner: Trial | None

    @property
    def command(self) -> str:
        """The command that started the run."""
        return self.folder.name.partition("-")[0]

    @property
    def finished(self) -> float:
        """When the run finished, in seconds since 1970."""
        return modified(self.folder / resume.RESULT)

    @property
    def trained(self) -> str | None:
        """The model that the report is about; None if the run did not train a single model."""
        if self.winner is not None:
            return BEST
        models = self.result.get("models", {})
        return next((role for role in (STUDENT, TEACHER) if role in models), None)

    @property
    def settings(self) -> Config:
        """The settings of the model that the report is about."""
        return with_settings(self.config, self.winner.params) if self.winner else self.config

    def rows(self) -> dict[str, Mapping[str, Any]]:
        """Return role -> "model", "parameters" and "test_score" of every model."""
        if self.winner is None:
            return dict(self.result.get("models", {}))
        if COMPARISON in self.result:
            names = {TEACHER: TEACHER, "best": BEST}
            return {names[role]: row for role, row in self.result["models"].items()}
        rows = {TEACHER: self.result["teacher"], BEST: self.result["best"]}
        # without labels no student is trained alone
        if uses_teacher(self.config) and "student_alone" in self.result:
            rows = {TEACHER: rows[TEACHER], ALONE: self.result["student_alone"], BEST: rows[BEST]}
        return rows

    def models(self, images: Images) -> dict[str, ModelFile]:
        """Return role -> model file of every model.

        Args:
            images: of the run.

        Raises:
            DataError: a file is missing or damaged.
        """
        best = self.folder / BEST_STUDENT / MODEL
        own = {
            ALONE: self.folder / STUDENT_ALONE / MODEL,
            self.trained: best if best.exists() else self.folder / MODEL,
        }
        return {
            role: load_model_file(own[role] if role in own else self._teacher(images))
            for role in self.rows()
        }

    def _teacher(self, images: Images) -> Place:
        """Return the path of the teacher that the run was given or trained."""
        recorded = self.result.get("teacher", {}).get("path")
        if recorded is not None and place(recorded).exists():
            return place(recorded)
        if is_model_file(self.config.model.teacher):
            return place(self.config.model.teacher)
        return teacher_folder(self.config, images, self.output) / MODEL

    @functools.cached_property
    def matching(self) -> Training | None:
        """The training whose channel graphs the report shows; None if none matched graphs.

        It is the training of the model that the report is about. If that model uses another method,
        it is the best trial or training of a graph method on the validation split.
        """
        if matches_graphs(self.settings.method.method):
            params = self.winner.params if self.winner else {}
            number = self.winner.number if self.winner else None
            return self._training(self.trained or "", params, number)
        teacher = self.settings.model.teacher
        for trial in self.trials:
            own = with_settings(self.config, trial.params)
            # the report has the teacher of its model alone
            is_alike = matches_graphs(own.method.method) and own.model.teacher == teacher
            if trial.status in ("finished", "stopped") and is_alike:
                name = "student of the best graph trial"
                return self._training(name, trial.params, trial.number)
        rows = [
            row
            for row in self.result.get("trainings", ())
            if row["status"] == "finished" and matches_graphs(row["params"]["method"])
        ]
        if not rows:
            return None
        score = self.config.data.score
        best = max(rows, key=lambda row: rank(row["val_score"], score))
        student = f"student of '{best['role']}' with seed {best['seed']}"
        return self._training(student, best["params"], best["number"])

    def _training(self, student: str, params: Mapping[str, Any], number: int | None) -> Training:
        folder = self.folder if number is None else trial_folder(self.folder, number)
        config = with_settings(self.config, params)
        return Training(student=student, config=config, params=params, folder=folder)

    def epochs(self) -> list[dict[str, float]]:
        """Return the metrics of each epoch of the model that the report is about."""
        if self.winner is not None:
            return self.winner.epochs
        return read_entries(self._journal, METRICS)

    @property
    def _journal(self) -> Place:
        return self.folder / worker.JOURNAL

    def versions(self) -> dict[str, str]:
        """Return package -> version that the run used; empty if unknown."""
        entries = read_journal(self.folder / resume.TRACKING)
        tags: dict[str, str] = next((e["tags"] for e in entries if e["op"] == "start"), {})
        prefix = "version."
        found = {n.removeprefix(prefix): v for n, v in tags.items() if n.startswith(prefix)}
        return found | ({"python": tags["python"]} if "python" in tags else {})


def open_finished(given: str, *, option: str = "OUTPUT", command: str | None = None) -> FinishedRun:
    """Read a finished run.

    Args:
        given: the folder of a run, or an output folder for its newest finished run.
        option: that it was given with, for messages.
        command: that must have started the run; None for any.

    Raises:
        ConfigError: there is no such run, or it is not finished.
        DataError: its files are damaged.
        StorageError: the files cannot be read.
    """
    folder = _finished_folder(given, option, command)
    result, facts = read_result(folder / resume.RESULT), read_facts(folder / resume.FACTS)
    path = folder / resume.CONFIG
    trials = _trials(folder, result.get("trials", result.get("trainings", ())))
    return FinishedRun(
        folder=folder,
        output=folder.parent.parent,
        config=read_run_config(path),
        result=result,
        facts=facts,
        trials=() if COMPARISON in result else trials,
        winner=_winner(trials, result),
    )


def _finished_folder(given: str, option: str, command: str | None) -> Place:
    try:
        folder = place(given)
    except ConfigError as error:
        raise ConfigError(f"{option} {error}") from error
    runs = folder / "runs"
    if runs.is_dir():
        start = f"{command}-" if command else ""
        started = [run for run in runs.iterdir() if run.name.startswith(start)]
        finished = [run for run in started if (run / resume.RESULT).exists()]
        if not finished:
            of = f" of 'raygkd {command}'" if command else ""
            raise ConfigError(
                f"{option} {given}: has no finished run{of}; start one with: "
                f"{to_paste('tune', '--output', given)}; or resume one with: "
                f"{to_paste('tune', '--resume', given)}"
            )
        return max(finished, key=lambda run: modified(run / resume.RESULT))
    for name in (resume.CONFIG, resume.FACTS):
        if not (folder / name).exists():
            raise ConfigError(
                f"{option} {given}: has no {name}; pass an output folder, or the folder of a run, "
                "which is in OUTPUT/runs"
            )
    own = folder.name.partition("-")[0]
    if command is not None and own != command:
        raise ConfigError(f"{option} {given}: is a run of 'raygkd {own}' and not of '{command}'")
    if not (folder / resume.RESULT).exists():
        raise ConfigError(
            f"{option} {given}: the run is not finished; once it is no longer running, resume it "
            f"with: {to_paste(own, '--resume', given)}"
        )
    return folder


def _trials(folder: Place, rows: Sequence[Mapping[str, Any]]) -> tuple[Trial, ...]:
    """Return the trials in the order of the result, with the metrics of each epoch."""
    trials = {
        row["number"]: Trial(
            number=row["number"], params=row["params"], status=row["status"], error=row["error"]
        )
        for row in rows
    }
    if trials:
        for number, epochs in search_history.read_epochs(folder / search_history.JOURNAL).items():
            if number in trials:
                trials[number].epochs.extend(epochs)
    return tuple(trials.values())


def _winner(trials: Sequence[Trial], result: Mapping[str, Any]) -> Trial | None:
    """Return the trial whose student was chosen, None if there is none."""
    if COMPARISON in result:
        number = result["selection"]["number"]
        return next((trial for trial in trials if trial.number == number), None)
    return next((trial for trial in trials if trial.status in ("finished", "stopped")), None)
