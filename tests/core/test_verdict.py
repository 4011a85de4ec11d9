"""The verdict on distillation: its arithmetic by hand, its words, and the scores it can be of.

Shapes: B batch, K classes, N images.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as reference
from small_runs import make_training
from torch import Tensor

from raygkd.data.parquet import ImageTable
from raygkd.engine import run_epoch
from raygkd.engine.tasks import Classification
from raygkd.metrics.classification import ClassificationMeter
from raygkd.metrics.metric import RegisteredMeter
from raygkd.metrics.ranking import WORST, higher_is_better, rank, scores_of
from raygkd.metrics.verdict import outcome, standard_error, verdict, verdict_line, verdict_metrics
from raygkd.registry import METRICS

CLASSES = 4
# of ten images the student is right on the first nine, and the student alone on the first six
RIGHT_OF_BEST, RIGHT_OF_ALONE = [1] * 9 + [0], [1] * 6 + [0] * 4


def told(right: list[int]) -> dict[str, Any]:
    """Return the scores of a model that is right on some images, as a task gives them."""
    parts = torch.tensor([[float(one), 1.0] for one in right], dtype=torch.float64)
    return {"score": sum(right) / len(right), "parts": parts}


def scored(logits_NK: Tensor, labels_N: Tensor, measure: str) -> dict[str, Any]:
    """Return the scores of a model that gives some logits, with those of every image."""

    class Given(torch.nn.Linear):
        def forward(self, rows_B: Tensor) -> Tensor:
            return logits_NK[rows_B]

    batches = [
        {"row": rows_B, "label": labels_N[rows_B]}
        for rows_B in torch.arange(len(labels_N)).split(7)
    ]
    task = Classification(logits_NK.shape[1], measure)
    model = Given(1, 1)
    return task.score(model, batches, lambda batch: batch["row"], by_image=True)


def test_the_standard_error_of_an_accuracy_is_that_of_the_mean_of_paired_differences():
    """By hand: three differences of 1 and seven of 0; their variance is 10/9 * 0.3 * 0.7."""
    found = verdict("accuracy", CLASSES, [told(RIGHT_OF_BEST)], [told(RIGHT_OF_ALONE)])
    assert found["difference"] == pytest.approx(0.3)
    assert found["standard_error"] == pytest.approx(math.sqrt(10 / 9 * 0.3 * 0.7 / 10))
    assert (found["images"], found["seeds"], found["outcome"]) == (10, 1, "no different")
    # unpaired it would be larger: the two are right on the same images
    unpaired = math.sqrt((0.9 * 0.1 + 0.6 * 0.4) / 9)
    assert found["standard_error"] < unpaired


@pytest.mark.parametrize(
    ("best", "alone", "words"),
    [
        (RIGHT_OF_BEST * 3, RIGHT_OF_ALONE * 3, "better"),
        (RIGHT_OF_ALONE * 3, RIGHT_OF_BEST * 3, "worse"),
        (RIGHT_OF_BEST, RIGHT_OF_ALONE, "no different"),
        (RIGHT_OF_BEST, RIGHT_OF_BEST, "no different"),
    ],
)
def test_more_than_two_standard_errors_are_no_chance(best: list[int], alone: list[int], words: str):
    found = verdict("accuracy", CLASSES, [told(best)], [told(alone)])
    assert found["outcome"] == words
    assert (abs(found["difference"]) > 2 * found["standard_error"]) == (words != "no different")


def test_the_bound_is_two_standard_errors():
    assert [outcome(lead, 0.01) for lead in (0.021, 0.02, -0.02, -0.021)] == [
        *("better", "no different", "no different", "worse")
    ]
    assert outcome(0.5, None) == "unknown"


def test_over_seeds_both_images_and_seeds_are_chance():
    """By hand: leads of 0.3 and 0.1 have a deviation of 0.1 sqrt 2, over the root of 2 seeds."""
    best = [told(RIGHT_OF_BEST), told(RIGHT_OF_BEST)]
    alone = [told(RIGHT_OF_ALONE), told([1] * 8 + [0] * 2)]
    found = verdict("accuracy", CLASSES, best, alone)
    assert found["difference"] == pytest.approx(0.2)
    # of each image the mean over the seeds: 0 six times, 1/2 twice, 1 once, 0 once
    differences = np.array([0.0] * 6 + [0.5, 0.5, 1.0, 0.0])
    of_images = differences.std(ddof=1) / math.sqrt(10)
    assert found["standard_error"] == pytest.approx(math.hypot(of_images, 0.1))
    assert (found["images"], found["seeds"]) == (10, 2)


def test_detectors_have_an_error_over_seeds_alone():
    one = verdict("map50", CLASSES, [{"score": 0.5, "parts": None}], [{"score": 0.4}])
    assert (one["outcome"], one["standard_error"]) == ("unknown", None)
    assert verdict_line(one) == (
        "verdict: unknown: mAP50 0.500 against 0.400 alone, +0.100 (standard error unknown: "
        "mAP50 needs several seeds; set --repeat, or --seeds of compare)"
    )
    assert verdict_metrics(one) == {"verdict_difference": pytest.approx(0.1)}
    best, alone = ([{"score": score} for score in of] for of in ((0.5, 0.6), (0.4, 0.48)))
    several = verdict("map50", CLASSES, best, alone)
    assert several["standard_error"] == pytest.approx(0.01)
    assert several["outcome"] == "better"
    assert verdict_line(several).endswith("+0.110 (standard error 0.010, over 2 seeds)")


def test_a_verdict_is_one_line():
    found = verdict("accuracy", CLASSES, [told(RIGHT_OF_BEST * 300)], [told(RIGHT_OF_ALONE * 300)])
    assert verdict_line(found) == (
        "verdict: better: 0.900 against 0.600 alone, +0.300 (standard error 0.008, paired over "
        "3,000 test images)"
    )
    assert verdict_metrics(found).keys() == {"verdict_difference", "verdict_standard_error"}
    assert verdict_metrics(None) == {}


def test_models_on_different_images_are_no_pair():
    with pytest.raises(ValueError, match="models were scored on"):
        verdict("accuracy", CLASSES, [told([1, 0])], [told([1, 0, 1])])


@pytest.fixture(scope="module")
def students(digits: ImageTable) -> dict[str, dict[str, Any]]:
    """Scores of three small students on the digits of the test split."""
    found = {}
    for name, seed, epochs in (("untrained", 0, 0), ("trained", 0, 6), ("another seed", 1, 6)):
        training = make_training(digits, method="none", batch_size=32, lr=0.1, epochs=6, seed=seed)
        for _ in range(epochs):
            run_epoch(training)
        student = training.objective.student.eval()
        batches = training.stream.eval_batches("test")
        found[name] = Classification(10).score(
            student,
            batches,
            lambda batch: training.normalise(batch["image"].float() / 255),  # noqa: B023
            by_image=True,
        )
    return found


@pytest.mark.parametrize(
    ("best", "alone", "words"),
    [
        ("trained", "untrained", "better"),
        ("untrained", "trained", "worse"),
        ("another seed", "trained", "no different"),
    ],
)
def test_the_verdict_on_real_students(
    students: dict[str, dict[str, Any]], best: str, alone: str, words: str
):
    found = verdict("accuracy", 10, [students[best]], [students[alone]])
    assert found["outcome"] == words
    assert verdict_line(found).startswith(f"verdict: {words}: {students[best]['score']:.3f} agai")


@pytest.mark.parametrize("name", ["accuracy", "balanced-accuracy", "macro-f1", "log-loss"])
def test_scores_are_those_of_scikit_learn_and_their_errors_those_of_a_bootstrap(name: str):
    rng = np.random.default_rng(3)
    labels = rng.choice(CLASSES, 240, p=[0.6, 0.25, 0.1, 0.05])
    logits = [
        torch.tensor(rng.normal(size=(240, CLASSES)) + strength * np.eye(CLASSES)[labels])
        for strength in (2.0, 1.0)
    ]
    # the first class is never said by the one
    logits[1][:, 0] -= 3
    best, alone = (scored(of_NK, torch.tensor(labels), name) for of_NK in logits)
    of_reference = {
        "accuracy": reference.accuracy_score,
        "balanced-accuracy": reference.balanced_accuracy_score,
        "macro-f1": lambda true, said: reference.f1_score(true, said, average="macro"),
    }
    for of_NK, found in zip(logits, (best, alone), strict=True):
        expected = (
            reference.log_loss(labels, of_NK.softmax(1).numpy())
            if name == "log-loss"
            else of_reference[name](labels, of_NK.argmax(1).numpy())
        )
        assert found["score"] == pytest.approx(expected) == found[name]
    found = verdict(name, CLASSES, [best], [alone])
    metric = METRICS.get(name)(CLASSES)
    leads = []
    for _ in range(400):
        rows = torch.tensor(rng.integers(0, 240, 240))
        first, second = (metric.value(of["parts"][rows].sum(0)) for of in (best, alone))
        leads.append(first - second)
    assert found["standard_error"] == pytest.approx(np.std(leads), rel=0.15)
    # the stronger one is better, also where lower is
    assert found["outcome"] == "better"
    assert (found["difference"] > 0) == (name != "log-loss")


def test_the_error_of_one_image_or_of_a_class_with_one_is_unknown_or_finite():
    metric = METRICS.get("accuracy")(2)
    one = torch.tensor([[1.0, 1.0]])
    assert standard_error(metric, [(one, one)]) is None
    labels = torch.tensor([0, 0, 0, 1])
    right, wrong = torch.eye(2)[labels], torch.eye(2)[1 - labels]
    best, alone = (scored(of, labels, "balanced-accuracy") for of in (right, wrong))
    assert verdict("balanced-accuracy", 2, [best], [alone])["difference"] == 1


def test_an_answer_that_is_no_number_is_wrong():
    logits = torch.tensor([[math.nan, 1.0], [2.0, 1.0]])
    labels = torch.tensor([0, 0])
    found = scored(logits, labels, "macro-f1")
    meter = ClassificationMeter(2)
    meter.update(logits, labels)
    assert found["accuracy"] == meter.compute()["accuracy"] == 0.5
    # one answer, which is right, of two images
    assert found["macro-f1"] == pytest.approx(2 / 3)
    assert found["balanced-accuracy"] == 0.5


def test_a_lower_score_that_is_better_has_the_higher_rank():
    assert not higher_is_better("log-loss")
    assert all(map(higher_is_better, ("auto", "map", "macro-f1")))
    assert rank(0.2, "log-loss") > rank(0.3, "log-loss")
    assert rank(0.2, "accuracy") < rank(0.3, "accuracy")
    assert rank(math.nan, "log-loss") == rank(math.inf, "log-loss") == WORST
    assert {"accuracy", "balanced-accuracy", "macro-f1", "log-loss"} <= set(
        scores_of("classification")
    )
    assert {"map", "map50"} <= set(scores_of("detection"))
    assert not {"map", "map50"} & set(scores_of("classification"))


def test_sums_of_every_image_are_kept_of_one_metric_alone():
    meter = RegisteredMeter("classification", CLASSES, "balanced-accuracy")
    logits, labels = torch.eye(CLASSES), torch.tensor([0, 1, 2, 0])
    meter.update(logits, labels)
    parts = meter.parts()
    assert parts is not None
    assert parts.shape == (4, 2 * CLASSES)
    assert parts[3].tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    assert RegisteredMeter("classification", CLASSES).parts() is None
