"""The weights of the graph losses follow the teacher's lead."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from small_runs import CPU, SPEC, make_config, random_stream, random_teacher, same, weights

from raygkd.assembly.training import build_training
from raygkd.config import Config, with_settings
from raygkd.config.defaults import dataset_defaults
from raygkd.engine import Training, read_checkpoint, restore, run_epoch, save_checkpoint

pytestmark = pytest.mark.unit
GRAPH = ("vertex", "edge", "spectral")


def training_with(score: float | None, **settings: Any) -> Training:
    """Return a run whose teacher has this validation accuracy."""
    scores = {} if score is None else {"val_accuracy": score}
    teacher = dataclasses.replace(random_teacher(), scores=scores)
    config = make_config(**settings)
    return build_training(
        config, spec=SPEC, teacher_file=teacher, stream=random_stream(), device=CPU
    )


@pytest.mark.parametrize(
    ("accuracy", "lead"), [(0.0, 1.0), (0.4, 1.0), (0.6, 1.0), (0.7, 0.5), (0.8, 0.0), (0.9, 0.0)]
)
def test_the_lead_falls_from_three_quarters_of_the_teachers_accuracy(accuracy: float, lead: float):
    training = training_with(0.8)
    assert training.lead == 1.0
    training.metrics = {"val_accuracy": accuracy, "val_score": 123.0}
    assert training.lead == pytest.approx(lead)


def test_a_teacher_without_a_right_answer_has_no_lead():
    training = training_with(0.0)
    training.metrics = {"val_accuracy": 0.1}
    assert training.lead == 0.0


def test_the_graph_terms_alone_fade_after_each_epoch():
    training = training_with(0.5)
    at_first = dict(training.objective.factors)
    run_epoch(training)
    assert training.objective.factors == at_first
    training.metrics["val_accuracy"] = 0.4
    run_epoch(training)
    assert training.objective.lead == pytest.approx(0.8)
    for name, factor in training.objective.factors.items():
        share = 0.8 if name in GRAPH else 1.0
        assert factor == pytest.approx(share * at_first[name]), name


def test_a_student_ahead_learns_from_its_labels_alone():
    def after(score: float, **settings: Any) -> dict[str, Any]:
        shares = {"method": "graph", "weights_unit": "gradient", "beta": 0.0, "gamma": 0.0}
        training = training_with(score, **{**shares, "alpha": 1.0, **settings})
        training.metrics = {"val_accuracy": 0.9}
        run_epoch(training)
        return weights(training.model)

    # the teacher is behind: however large, its weights count for nothing
    assert same(after(0.5), after(0.5, alpha=9.0))
    assert not same(after(0.5), after(1.0))


@pytest.mark.parametrize(
    "settings",
    [{"fade": "none"}, {"method": "kd"}, {"method": "graph+kd", "task_weight": 0.0}],
    ids=["none", "a published method", "without labels"],
)
def test_other_runs_do_not_fade(settings: dict[str, Any]):
    training = training_with(0.5, **settings)
    training.metrics = {"val_accuracy": 0.4}
    assert training.lead == 1.0


def test_without_a_score_of_the_teacher_nothing_fades():
    training = training_with(None)
    training.metrics = {"val_accuracy": 0.4}
    assert training.lead == 1.0


def test_detectors_keep_their_weights():
    assert dataset_defaults("voc")["fade"] == "none"
    assert with_settings(Config(), {}).method.fade == "lead"


def test_a_run_that_fades_goes_on_as_if_unbroken(tmp_path: Path):
    def training() -> Training:
        return training_with(0.07, epochs=3, weights_unit="gradient", alpha=3.0)

    whole = training()
    for _ in range(3):
        run_epoch(whole)
    broken = training()
    for _ in range(2):
        run_epoch(broken)
    save_checkpoint(tmp_path / "checkpoint.pt", broken)
    resumed = training()
    restore(resumed, read_checkpoint(tmp_path / "checkpoint.pt"))
    run_epoch(resumed)
    assert resumed.objective.lead == whole.objective.lead < 1.0, whole.metrics
    assert same(weights(resumed.model), weights(whole.model))
