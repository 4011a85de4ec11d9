"""Steps on images without labels: losses, meters, and scores that need no labels.

Shapes: B batch, C channels, H height, W width, K classes, N images, D features.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_runs import (
    BATCH,
    CLASSES,
    CPU,
    SPEC,
    TensorStream,
    curve,
    make_config,
    random_batch,
    random_teacher,
    same,
    weights,
)
from torch import Tensor

from raygkd.assembly.models import student_file
from raygkd.assembly.training import build_training
from raygkd.engine import Training, read_checkpoint, restore, run_epoch, save_checkpoint
from raygkd.engine.label_loss import LabelLoss
from raygkd.engine.mixing import Mixing
from raygkd.engine.pooled_features import neighbour_probe, pooled_features
from raygkd.engine.step import gradient_norms
from raygkd.engine.tasks import Classification
from raygkd.errors import Stopped
from raygkd.metrics.similarity import LinearCKA
from raygkd.models import build_classifier, build_from_file

pytestmark = pytest.mark.unit
LOGITS = ("kd", "graph+kd", "dist", "logit-std")
HALF = torch.arange(BATCH) % 2 == 0


def half_labelled(seed: int = 0) -> dict[str, Tensor]:
    """Return a batch of which every other image has no label."""
    batch = random_batch(seed)
    return {**batch, "label": batch["label"].where(HALF, -1)}


def training(*, labelled: bool, batches: int = 3, **settings: Any) -> Training:
    """Return a run on batches half without labels, or wholly."""
    settings = {"unlabelled_share": 0.5 if labelled else 1.0, **settings}
    if not labelled:
        score = "agreement" if settings["method"] in LOGITS else "cka"
        settings |= {"dataset": "unlabelled", "data_dir": "photos", "score": score}
    spec = dataclasses.replace(
        SPEC,
        unlabelled=100,
        class_counts=SPEC.class_counts if labelled else (),
        score=settings.get("score", "accuracy"),
    )
    given = [half_labelled(seed) for seed in range(batches)]
    if not labelled:
        given = [{**one, "label": torch.full((BATCH,), -1)} for one in given]
    stream = TensorStream(given)
    if labelled:
        stream.eval_batches = lambda split: iter([random_batch(7)])
    return build_training(
        make_config(**settings), spec=spec, teacher_file=random_teacher(), stream=stream, device=CPU
    )


# The labels' loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_labels_loss_is_that_of_the_labelled_images(smoothing: float, weighted: bool) -> None:
    logits_BK = torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(0))
    labels_B = half_labelled()["label"]
    weights_K = torch.linspace(0.5, 2, CLASSES) if weighted else None
    alone = LabelLoss(smoothing, weights_K)(logits_BK[HALF], labels_B[HALF])
    partly = LabelLoss(smoothing, weights_K, partly=True)
    assert torch.allclose(partly(logits_BK, labels_B), alone)
    # as shares, too
    shares_BK = F.one_hot(labels_B.clamp(min=0), CLASSES) * HALF[:, None].float()
    assert torch.allclose(partly(logits_BK, shares_BK), alone)
    whole_B = random_batch()["label"]
    assert torch.allclose(
        partly(logits_BK, whole_B), LabelLoss(smoothing, weights_K)(logits_BK, whole_B)
    )


def test_a_batch_without_labels_has_no_loss_and_no_gradient() -> None:
    logits_BK = torch.randn(4, CLASSES, requires_grad=True)
    for targets in (torch.full((4,), -1), torch.zeros(4, CLASSES)):
        loss = LabelLoss(0.1, partly=True)(logits_BK, targets)
        [gradient_BK] = torch.autograd.grad(loss, logits_BK)
        assert loss.item() == 0.0
        assert gradient_BK.abs().max() == 0.0


def test_mixed_images_have_the_shares_of_their_labels() -> None:
    mixing = Mixing(mixup=0.5, cutmix=0.0, num_classes=CLASSES)
    batch = {"image": random_batch(rows=4)["image"], "label": torch.tensor([3, -1, -1, 5])}
    mixed = mixing(batch, 1, CPU)
    shares_BK, share = mixed["shares"], float(mixed["shares"][0, 3])
    assert 0 < share < 1
    # each image with the one before it
    assert shares_BK.sum(1).tolist() == pytest.approx([1.0, 1 - share, 0.0, share])
    wanted = [3, -1, -1, 5] if share > 0.5 else [5, 3, -1, -1]
    assert mixed["label"].tolist() == wanted


# Steps


@pytest.mark.parametrize("method", ["graph", "kd", "graph+kd", "sp"])
@pytest.mark.parametrize("recipe", [{}, {"mixup": 0.2, "label_smoothing": 0.1}])
def test_every_image_teaches_and_the_labelled_ones_have_labels(
    method: str, recipe: dict[str, float]
) -> None:
    run = training(labelled=True, method=method, epochs=1, **recipe)
    [epoch] = curve(run)
    assert all(abs(value) < float("inf") for value in epoch.values())
    assert epoch["val_score"] == epoch["val_accuracy"]
    assert 0 <= epoch["train_accuracy"] <= 1
    assert epoch["loss_task"] > 0
    assert epoch["gradient_task"] > 0


def test_accuracy_and_images_are_counted_apart() -> None:
    meter = Classification(CLASSES, unlabelled_share=0.5).meter(CPU)
    batch = half_labelled()
    right_BK = F.one_hot(batch["label"].clamp(min=0), CLASSES).float()
    # the first labelled image is wrong, and so is every one without a label
    right_BK[0] = F.one_hot((batch["label"][0] + 1) % CLASSES, CLASSES)
    meter.update(right_BK, batch)
    again = Classification(CLASSES, unlabelled_share=0.5).meter(CPU)
    again.load_state_dict(meter.state_dict())
    for one in (meter, again):
        found = one.compute()
        assert found == {"images": BATCH, "train_accuracy": pytest.approx(31 / 32)}


@pytest.mark.parametrize("method", ["graph", "kd", "graph+kd", "sp", "dist", "logit-std"])
def test_a_student_learns_without_any_label(method: str) -> None:
    run = training(labelled=False, method=method, epochs=2, fade="lead")
    epochs = curve(run)
    reads_logits = method in LOGITS
    for epoch in epochs:
        assert "loss_task" not in epoch
        assert "train_accuracy" not in epoch
        assert "val_accuracy" not in epoch
        assert 0 <= epoch["val_cka"] <= 1
        assert ("val_agreement" in epoch) == reads_logits
        assert epoch["val_score"] == epoch["val_agreement" if reads_logits else "val_cka"]
    assert epochs[1]["train_loss"] < epochs[0]["train_loss"]
    assert run.lead == 1.0
    file = student_file(
        make_config(method=method, dataset="unlabelled", data_dir="photos"),
        dataclasses.replace(SPEC, unlabelled=100, class_counts=()),
        run.objective.student.state_dict(),
        {},
    )
    assert file.class_names == (SPEC.class_names if reads_logits else ())
    assert build_from_file(file)(torch.rand(2, 3, 8, 8)).shape == (2, 10 if reads_logits else 1)


def test_a_gradient_of_norm_1_is_the_unit_without_labels() -> None:
    run = training(labelled=False, method="graph", weights_unit="gradient", alpha=2.0, beta=0.0,
                   gamma=0.0, graphs="batch")  # fmt: skip
    run_epoch(run)
    norms = gradient_norms(run, half_labelled())[1]
    assert run.objective.factors["vertex"] * norms["vertex"] == pytest.approx(2.0, rel=0.8)


@pytest.mark.parametrize("labelled", [False, True])
def test_an_interrupted_epoch_is_resumed_to_the_bit(tmp_path: Path, labelled: bool) -> None:
    settings = {"method": "graph", "labelled": labelled, "epochs": 2}
    whole = training(**settings)
    expected = curve(whole)
    run, steps = training(**settings), iter([False, True])
    with pytest.raises(Stopped):
        run_epoch(run, lambda: next(steps))
    save_checkpoint(tmp_path / "checkpoint.pt", run)
    again = training(**settings)
    restore(again, read_checkpoint(tmp_path / "checkpoint.pt"))
    assert curve(again) == expected
    assert same(weights(again.objective), weights(whole.objective))


# Scores


def gram_cka(first_ND: Tensor, second_NE: Tensor) -> float:
    """Return the debiased CKA by its definition on Gram matrices."""

    def hsic(one_NN: Tensor, other_NN: Tensor) -> Tensor:
        count, ones_N = len(one_NN), torch.ones(len(one_NN), dtype=torch.float64)
        sums = (ones_N @ one_NN @ ones_N) * (ones_N @ other_NN @ ones_N)
        crossed = ones_N @ one_NN @ other_NN @ ones_N
        total = (one_NN @ other_NN).trace() + sums / ((count - 1) * (count - 2))
        return (total - 2 / (count - 2) * crossed) / (count * (count - 3))

    one_NN, other_NN = (
        (features @ features.T).fill_diagonal_(0) for features in (first_ND, second_NE)
    )
    return float(hsic(one_NN, other_NN) / (hsic(one_NN, one_NN) * hsic(other_NN, other_NN)).sqrt())


def cka(*batches: tuple[Tensor, Tensor]) -> float:
    meter = LinearCKA((batches[0][0].shape[1], batches[0][1].shape[1]))
    for first_ND, second_NE in batches:
        meter.update(first_ND, second_NE)
    return meter.compute()


def test_cka_is_that_of_its_definition_in_any_batches() -> None:
    draw = torch.Generator().manual_seed(0)
    first_ND = torch.randn(40, 6, generator=draw).double() + 1
    second_NE = torch.cat([first_ND[:, :2] * 2, torch.randn(40, 3, generator=draw).double()], 1)
    wanted = gram_cka(first_ND, second_NE)
    assert 0.2 < wanted < 0.9
    assert cka((first_ND, second_NE)) == pytest.approx(wanted, rel=1e-9)
    parts = [(first_ND[:7], second_NE[:7]), (first_ND[7:], second_NE[7:])]
    assert cka(*parts) == pytest.approx(wanted, rel=1e-9)


def test_cka_of_rotated_features_is_1_and_of_unrelated_ones_0() -> None:
    draw = torch.Generator().manual_seed(0)
    first_ND = torch.randn(60, 300, generator=draw)
    rotation = torch.linalg.qr(torch.randn(300, 300, generator=draw))[0]
    assert cka((first_ND, 3 * first_ND @ rotation + 5)) == pytest.approx(1.0, abs=1e-4)
    # fewer images than features make the biased estimate 0.8
    assert cka((first_ND, torch.randn(60, 300, generator=draw))) < 0.1
    assert cka((first_ND, torch.ones(60, 2))) == 0.0
    with pytest.raises(ValueError, match="at least 4 images"):
        cka((first_ND[:3], first_ND[:3]))


def test_the_nearest_images_vote_by_their_likeness() -> None:
    torch.manual_seed(0)
    model = build_classifier("resnet8", CLASSES).eval()

    def inputs(batch: Any) -> Tensor:
        return batch["image"].float() / 255

    known = [random_batch(seed, rows=16) for seed in range(2)]
    images, labels = inputs(random_batch(9, rows=6)), torch.zeros(6, dtype=torch.int64)
    with torch.no_grad(), pooled_features(model) as pooled:
        bank_NC = F.normalize(torch.cat([pooled(inputs(one))[1] for one in known]))
        logits_BK, features_BC = pooled(images)
    labels_N = torch.cat([one["label"] for one in known])
    cosines_BN = F.normalize(features_BC) @ bank_NC.T
    votes_BK = torch.zeros(6, CLASSES)
    for image in range(6):
        for place in cosines_BN[image].argsort(descending=True)[:20].tolist():
            votes_BK[image, labels_N[place]] += (cosines_BN[image, place] / 0.07).exp()
    labels = votes_BK.argmax(1)
    labels[0] = (labels[0] + 1) % CLASSES
    with neighbour_probe(model, known, inputs, CLASSES) as probe:
        assert torch.allclose(probe.votes(features_BC), votes_BK, rtol=1e-4)
        assert torch.allclose(probe(images, labels), logits_BK)
        assert probe.accuracy() == pytest.approx(5 / 6)
    assert not model._forward_hooks


def test_the_vote_of_neighbours_is_a_score_of_models_without_classes_too() -> None:
    model = build_classifier("resnet8", CLASSES)
    few = [{**random_batch(rows=4), "label": torch.full((4,), 3)}]
    task = Classification(CLASSES, "knn", neighbours=lambda: few)
    found = task.score(model.eval(), few, lambda batch: batch["image"].float() / 255)
    assert found["score"] == found["knn"] == 1.0
    assert 0 <= found["accuracy"] <= 1
    # a model without classes has this score alone
    bare = build_classifier("resnet8", 1)
    found = task.score(bare.eval(), few, lambda batch: batch["image"].float() / 255)
    assert found == {"score": 1.0, "knn": 1.0}
