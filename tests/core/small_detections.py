"""Small detection runs on the CPU: scenes of handwritten digits, narrow detectors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raygkd.assembly.methods import uses_teacher
from raygkd.assembly.models import untrained_file
from raygkd.assembly.training import build_training
from raygkd.config import Config, from_mapping, with_settings
from raygkd.data import PlainStream, open_source, split_rows
from raygkd.data.box_transforms import build_box_transform
from raygkd.data.parquet import ImageTable, open_table
from raygkd.data.prepare import prepare
from raygkd.data.spec import ImageSpec
from raygkd.engine import TeacherStore, Training
from raygkd.models import ModelFile

SIDE = 96
SPEC = ImageSpec(
    class_names=tuple("0123456789"),
    image_size=(SIDE, SIDE),
    mean=(0.26,) * 3,
    std=(0.18,) * 3,
    task="detection",
    score="map50",
)
SCENES = {"train": 24, "val": 11, "test": 3}
TEACHER = "fcos_resnet18_fpn32"
STUDENT = "fcos_mobilenet_v3_small_fpn16"


def prepare_scenes(folder: Path) -> ImageTable:
    """Write some scenes as shards and open them; one of them has no box."""
    source = open_source("digits-voc")
    samples = []
    for split, count in SCENES.items():
        samples += [sample for sample in source.samples if sample.split == split][:count]
    assert samples[0].boxes is not None
    nothing = samples[0].boxes.keep(np.zeros(len(samples[0].boxes), bool))
    samples[0] = dataclasses.replace(samples[0], boxes=nothing)
    prepare(dataclasses.replace(source, samples=samples), str(folder))
    return open_table(str(folder))


def scenes_stream(
    table: ImageTable, config: Config, rank: int = 0, world_size: int = 1
) -> PlainStream:
    """Return the scenes as batches of one rank."""
    assert table.boxes is not None
    most = table.boxes.most
    splits = split_rows(
        table.labels,
        table.splits,
        val_fraction=0.1,
        test_fraction=0.1,
        limit_train=None,
        seed=0,
    )
    return PlainStream(
        table,
        splits,
        build_box_transform("jitter", SIDE, train=True, most=most),
        build_box_transform("jitter", SIDE, train=False, most=most),
        batch_size=config.optim.batch_size // world_size,
        seed=config.optim.seed,
        rank=rank,
        world_size=world_size,
    )


def detector_file(name: str = TEACHER, seed: int = 100) -> ModelFile:
    """Return a model file of random weights."""
    return untrained_file(name, SPEC, seed)


def detection_config(**settings: Any) -> Config:
    """Return the settings of a run of two epochs with all terms, changed as told."""
    config = from_mapping({"data": {"dataset": "digits-voc"}})
    models = {"teacher": TEACHER, "student": STUDENT, "levels": [3, 4], "dim": 4}
    terms = {
        "weights_unit": "loss",
        "graphs": "image",
        "temperature": 10.0,
        "alpha": 0.1,
        "beta": 1.0,
        "gamma": 1.0,
    }
    return with_settings(config, {**models, "epochs": 2, **terms, **settings})


def detection_training(
    table: ImageTable,
    *,
    rank: int = 0,
    world_size: int = 1,
    parallel: Callable[[nn.Module], nn.Module] = lambda module: module,
    teacher_store: TeacherStore | None = None,
    **settings: Any,
) -> Training:
    """Return a run on the scenes."""
    config = detection_config(**settings)
    teacher = detector_file(config.model.teacher) if uses_teacher(config) else None
    return build_training(
        config,
        spec=SPEC,
        teacher_file=teacher,
        stream=scenes_stream(table, config, rank, world_size),
        device=torch.device("cpu"),
        rank=rank,
        parallel=parallel,
        teacher_store=teacher_store,
    )


class Oracle(nn.Module):
    """Finds every box that its batch has, and nothing else, with an error that the row decides.

    Args:
        noise: standard deviation of the error in pixels.
    """

    def __init__(self, noise: float):
        super().__init__()
        self.noise = noise

    def forward(self, batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Return the boxes of each image, as a detector does."""
        found = []
        for row, boxes, classes in zip(batch["row"], batch["boxes"], batch["classes"]):
            known = classes >= 0
            generator = torch.Generator().manual_seed(int(row))
            error = self.noise * torch.randn(boxes.shape, generator=generator)
            scores = torch.rand(len(boxes), generator=generator)
            found.append(
                {
                    "boxes": (boxes + error)[known],
                    "labels": classes[known],
                    "scores": scores[known],
                }
            )
        return found
