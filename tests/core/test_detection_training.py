"""Distilling detectors: the same loop as for classifiers, with boxes for targets.

Shapes: B batch, S side of the canvas.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from small_detections import (
    SCENES,
    SIDE,
    SPEC,
    TEACHER,
    Oracle,
    detection_config,
    detection_training,
    detector_file,
    prepare_scenes,
    scenes_stream,
)
from small_runs import curve, same, weights
from torch import Tensor

from raygkd.assembly.models import new_model, start_from_teacher
from raygkd.assembly.training import normaliser
from raygkd.data.parquet import ImageTable
from raygkd.deploy.modules import DeployedDetector
from raygkd.engine import (
    Detection,
    check_terms,
    read_checkpoint,
    restore,
    run_epoch,
    save_checkpoint,
)
from raygkd.errors import ConfigError, DataError, Stopped
from raygkd.models.weights import TRAINED_ON_COCO, torchvision_file

PARTS = {"loss_task_classification", "loss_task_bbox_regression", "loss_task_bbox_ctrness"}
GRAPH = {"task", "vertex", "edge", "spectral"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    return prepare_scenes(tmp_path_factory.mktemp("scenes") / "shards")


def batch_of(training: Any) -> Mapping[str, Tensor]:
    return next(iter(training.stream.train_batches(0)))


def test_an_epoch_has_every_term_part_and_score(scenes: ImageTable) -> None:
    training = detection_training(scenes)
    metrics = run_epoch(training)
    assert {f"loss_{term}" for term in GRAPH} | PARTS <= set(metrics)
    assert {f"gradient_{term}" for term in GRAPH} <= set(metrics)
    assert metrics["loss_task"] == pytest.approx(sum(metrics[part] for part in PARTS), rel=1e-5)
    assert {"val_score", "val_map", "val_map50", "val_map75", "val_ap50_voc"} <= set(metrics)
    assert metrics["val_score"] == metrics["val_map50"]
    assert all(np.isfinite(value) for value in metrics.values())


def test_every_term_falls_in_some_epochs_and_the_teacher_stays(scenes: ImageTable) -> None:
    training = detection_training(scenes, epochs=6, lr=0.005, alpha=1.0)
    assert training.teacher is not None
    before = {n: t.clone() for n, t in training.teacher.model.state_dict().items()}
    epochs = curve(training)
    for term in GRAPH:
        assert epochs[-1][f"loss_{term}"] < epochs[0][f"loss_{term}"], term
    after = training.teacher.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not training.teacher.model.training


def test_all_terms_together_reach_every_parameter(scenes: ImageTable) -> None:
    training = detection_training(scenes)
    batch = batch_of(training)
    images_BCSS, targets = training.to_device(batch)
    assert training.teacher is not None
    teacher = training.teacher(training.teacher_normalise(images_BCSS))
    terms, _ = training.objective(training.normalise(images_BCSS), targets, teacher)
    training.objective.total(terms).backward()
    missing = [n for n, p in training.objective.named_parameters() if p.grad is None]
    assert missing == []


def test_boxes_on_the_canvas_are_scored_on_the_original_images(scenes: ImageTable) -> None:
    assert scenes.boxes is not None
    task = Detection(10, scenes.boxes, "map")
    stream = scenes_stream(scenes, detection_config(batch_size=4))
    scores = task.score(Oracle(noise=0.0), stream.eval_batches("val"), lambda batch: batch)
    assert scores["count"] == SCENES["val"]
    assert scores["score"] == scores["map"] == pytest.approx(1.0)
    assert scores["ap50_voc"] == pytest.approx(1.0)

    def shifted(batches: Iterator[Mapping[str, Tensor]]) -> Iterator[Mapping[str, Tensor]]:
        for batch in batches:
            yield {**batch, "boxes": batch["boxes"] * 1.2}

    worse = task.score(Oracle(noise=0.0), shifted(stream.eval_batches("val")), lambda batch: batch)
    assert worse["map"] < 0.7


def test_resumed_run_equals_one_without_a_break(scenes: ImageTable, tmp_path: Path) -> None:
    whole = detection_training(scenes)
    expected = curve(whole)
    broken_off = detection_training(scenes)
    run_epoch(broken_off)
    save_checkpoint(tmp_path / "checkpoint.pt", broken_off)
    torch.manual_seed(1234)
    resumed = detection_training(scenes)
    restore(resumed, read_checkpoint(tmp_path / "checkpoint.pt"))
    assert curve(resumed) == expected[1:]
    assert same(weights(resumed.objective), weights(whole.objective))


def test_run_that_is_stopped_after_a_step_goes_on_as_one_without_a_break(
    scenes: ImageTable, tmp_path: Path
) -> None:
    expected = curve(detection_training(scenes))
    stopped = detection_training(scenes)
    with pytest.raises(Stopped):
        run_epoch(stopped, lambda: True)
    assert stopped.part is not None
    assert stopped.part.steps == 1
    save_checkpoint(tmp_path / "checkpoint.pt", stopped)
    resumed = detection_training(scenes)
    restore(resumed, read_checkpoint(tmp_path / "checkpoint.pt"))
    assert curve(resumed) == expected


def test_a_first_batch_without_boxes_is_no_mistake_in_the_set_up(scenes: ImageTable) -> None:
    models = {"teacher": "ssdlite_resnet18_fpn16", "student": "ssdlite_mobilenet_v3_small_fpn16"}
    training = detection_training(scenes, batch_size=1, **models)
    blank, *_ = (b for b in training.stream.train_batches(0) if training.task.is_blank(b))
    norms = check_terms(training, blank)
    assert norms["task"] == 0.0
    assert min(norms[name] for name in GRAPH - {"task"}) > 0.0


def test_foreground_weights_change_the_vertex_loss_alone(scenes: ImageTable) -> None:
    norms = {}
    for share in (None, 0.9):
        training = detection_training(scenes, foreground=share)
        norms[share] = check_terms(training, batch_of(training))
    assert norms[None]["vertex"] != norms[0.9]["vertex"]
    for term in ("task", "edge", "spectral"):
        assert norms[None][term] == norms[0.9][term]


@pytest.mark.parametrize("method", ["graph", "none"])
def test_a_student_inherits_neck_and_head_of_its_teacher(scenes: ImageTable, method: str) -> None:
    inherits = None if method == "graph" else True
    settings = {"student": "fcos_mobilenet_v3_small_fpn32", "inherit": inherits, "method": method}
    training = detection_training(scenes, **settings)
    assert (training.teacher is None) == (method == "none")
    student, teacher = training.objective.student.state_dict(), detector_file().state_dict
    shared = [name for name in student if name.startswith("net.head.")]
    assert shared
    for name in shared:
        assert torch.equal(student[name], teacher[name])


@pytest.mark.parametrize(
    ("settings", "inherits"),
    [
        ({}, True),
        ({"student_weights": "imagenet"}, True),
        ({"student_weights": "none"}, True),
        ({"student_weights": "detector.pt"}, False),
        ({"student_weights": "detector.pt", "inherit": True}, True),
        ({"inherit": False}, False),
        ({"method": "none"}, False),
        ({"student": "fcos_mobilenet_v3_small_fpn16"}, False),
        ({"student": "retinanet_mobilenet_v3_small_fpn16"}, False),
    ],
)
def test_a_student_inherits_where_it_distils_and_has_no_weights_of_its_own(
    settings: dict[str, Any], inherits: bool
) -> None:
    config = detection_config(**{"student": "fcos_mobilenet_v3_small_fpn32", **settings})
    names = config.model.student, config.model.teacher
    student, teacher = (new_model(name, SPEC) for name in names)
    assert bool(start_from_teacher(config, student, teacher)) == inherits


def test_a_student_that_is_told_to_inherit_and_cannot_is_refused() -> None:
    config = detection_config(inherit=True)
    student, teacher = (new_model(name, SPEC) for name in (config.model.student, TEACHER))
    with pytest.raises(ConfigError, match="choose detectors of the same _fpn width"):
        start_from_teacher(config, student, teacher)


def test_families_whose_pyramids_overlap_are_matched_on_the_levels_both_have(
    scenes: ImageTable,
) -> None:
    training = detection_training(scenes, teacher="fasterrcnn_resnet18_fpn32", levels=None)
    assert training.objective.graph is not None
    assert sorted(training.objective.graph.student_shapes) == [3, 4, 5]
    assert set(check_terms(training, batch_of(training))) == GRAPH


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student": "resnet8"}, "resnet8 is a classifier, but the images have boxes"),
        ({"levels": [2]}, r"no level 2 \(allowed: 3, 4, 5, 6, 7\)"),
        ({"dim": 32}, "32"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    scenes: ImageTable, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        detection_training(scenes, **settings)


def test_a_detector_in_use_gives_what_the_model_finds() -> None:
    file = detector_file()
    deployed = DeployedDetector(file).eval()
    images_BCSS = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        packed = deployed(images_BCSS)
        found = deployed.model(
            normaliser(SPEC.mean, SPEC.std, torch.device("cpu"), SPEC.image_size)(images_BCSS)
        )
    assert packed.shape == (2, 100, 6)
    for rows, one in zip(packed, found):
        count = len(one["scores"])
        assert torch.equal(rows[:count, :4], one["boxes"])
        assert torch.equal(rows[:count, 4], one["scores"])
        assert torch.equal(rows[:count, 5].long(), one["labels"])
        assert (rows[count:] == -1).all()


def test_a_student_starts_from_weights_of_a_file_or_of_imagenet(
    scenes: ImageTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(7)
    body = torchvision.models.resnet18(weights=None)
    file = tmp_path / "body.pt"
    torch.save(body.state_dict(), file)
    # where torchvision keeps what it has fetched
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    fetched = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    fetched.parent.mkdir(parents=True)
    shutil.copy(file, fetched)
    for start in (str(file), "imagenet"):
        training = detection_training(scenes, method="none", student=TEACHER, student_weights=start)
        state = training.objective.student.state_dict()
        for name, tensor in body.layer4.state_dict().items():
            assert torch.equal(state[f"net.backbone.body.layer4.{name}"], tensor)


@pytest.mark.parametrize("name", TRAINED_ON_COCO)
def test_weights_of_detectors_trained_on_coco_are_torchvisions(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    fetched = tmp_path / "checkpoints" / url.rpartition("/")[2]
    fetched.parent.mkdir(parents=True)
    fetched.touch()
    assert torchvision_file(name, "coco") == fetched
    with pytest.raises(ConfigError, match=f"no {name}64 that was trained on COCO; choose faster"):
        torchvision_file(f"{name}64", "coco")


def test_a_detector_may_start_from_random_weights(scenes: ImageTable) -> None:
    states = [
        detection_training(scenes, method="none", student_weights=weights).objective.student
        for weights in (None, "none")
    ]
    first, second = (one.state_dict() for one in states)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_that_are_not_there_are_refused(
    scenes: ImageTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "missing.pt"
    with pytest.raises(DataError, match=f"cannot read weights {missing}: No such file"):
        detection_training(scenes, student_weights=str(missing))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    # nothing listens there
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"cannot be downloaded from https://.*put the file at"):
        detection_training(scenes, student_weights="imagenet")
