"""The method pays: with a better teacher the default student is better than the same one alone."""

from __future__ import annotations

import pytest
import torch

from raygkd.assembly.models import student_file
from raygkd.assembly.training import build_training
from raygkd.config import Config, with_settings
from raygkd.data import PlainStream, build_transform, open_source, split_rows
from raygkd.data.parquet import ImageTable, open_table
from raygkd.data.prepare import prepare
from raygkd.data.spec import ImageSpec
from raygkd.engine import evaluate, run_epoch
from raygkd.models import ModelFile

SPEC = ImageSpec(
    class_names=tuple("0123456789"), image_size=(32, 32), mean=(0.2,) * 3, std=(0.25,) * 3
)
# the teacher sees all images, and the students a few of them
TEACHER_EPOCHS, EPOCHS, FEW = 10, 10, 2000


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    folder = str(tmp_path_factory.mktemp("cluttered") / "shards")
    prepare(open_source("cluttered-digits"), folder)
    return open_table(folder)


def trained(
    images: ImageTable, config: Config, teacher: ModelFile | None
) -> tuple[float, ModelFile]:
    """Return the score on the test split of a model after its training, and the model."""
    splits = split_rows(
        images.labels,
        images.splits,
        val_fraction=0.1,
        test_fraction=0.1,
        limit_train=config.data.limit_train,
        seed=0,
    )
    stream = PlainStream(
        images,
        splits,
        build_transform("crop", 32, train=True),
        build_transform("crop", 32, train=False),
        batch_size=config.optim.batch_size,
        seed=config.optim.seed,
    )
    training = build_training(
        config, spec=SPEC, teacher_file=teacher, stream=stream, device=torch.device("cpu")
    )
    for _ in range(config.optim.epochs):
        run_epoch(training)
    state = training.objective.student.state_dict()
    return evaluate(training, "test")["score"], student_file(config, SPEC, state, {})


@pytest.mark.slow
def test_a_better_teacher_makes_a_better_student(images: ImageTable):
    large = {"method": "none", "student": "resnet20", "epochs": TEACHER_EPOCHS}
    of_teacher, teacher = trained(images, with_settings(Config(), large), None)
    shared = {"student": "resnet8", "epochs": EPOCHS, "limit_train": FEW}
    scores = {
        method: trained(images, with_settings(Config(), {**shared, "method": method}), teacher)[0]
        for method in ("none", "graph", "graph+dist")
    }
    assert of_teacher > scores["none"] + 0.05
    assert scores["graph"] > scores["none"] + 0.05
    assert scores["graph+dist"] > scores["none"] + 0.05
