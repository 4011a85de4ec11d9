"""Print the metrics of three epochs of distillation on real digits: the content of curve.json.

Run ``python tests/golden/print_curve.py > tests/golden/curve.json`` after a wanted change of
losses, models, data order or training, and say in the commit why the values changed.
"""

import json
import tempfile

import torch

from raygkd.assembly.training import build_training
from raygkd.config import Config, with_settings
from raygkd.data import PlainStream, build_transform, open_source, split_rows
from raygkd.data.parquet import open_table
from raygkd.data.prepare import prepare
from raygkd.data.spec import ImageSpec
from raygkd.engine import run_epoch
from raygkd.models import ModelFile, build_classifier

IMAGES = 256
SPEC = ImageSpec(
    class_names=tuple("0123456789"), image_size=(8, 8), mean=(0.3,) * 3, std=(0.37,) * 3
)
# all that the curve depends on, so that other defaults leave it as it is
SETTINGS = {
    "method": "graph+kd",
    "epochs": 3,
    "batch_size": 64,
    "lr": 0.05,
    "seed": 0,
    "weights_unit": "loss",
    "graphs": "image",
    "temperature": 0.5,
    "adapter": "plain",
    "alpha": 1.0,
    "beta": 1.0,
    "gamma": 1.0,
}
METRICS = ("train_loss", "loss_task", "loss_kd", "loss_vertex", "loss_edge", "loss_spectral")


def golden_curve() -> list[dict[str, float]]:
    """Return each epoch's losses of a resnet8 that a random resnet20 teaches.

    In float64: rounding, which differs between processors, grows from step to step, and in float32
    it would reach a thousandth of a loss.
    """
    config = with_settings(Config(), SETTINGS)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with tempfile.TemporaryDirectory() as folder:
            training = build_training(
                config,
                spec=SPEC,
                teacher_file=_random_teacher(),
                stream=_stream(f"{folder}/digits", config),
                device=torch.device("cpu"),
            )
            epochs = [run_epoch(training) for _ in range(config.optim.epochs)]
    finally:
        torch.set_default_dtype(usual)
    return [{name: epoch[name] for name in METRICS} for epoch in epochs]


def _random_teacher() -> ModelFile:
    torch.manual_seed(1)
    return ModelFile(
        name="resnet20",
        class_names=SPEC.class_names,
        image_size=SPEC.image_size,
        mean=SPEC.mean,
        std=SPEC.std,
        state_dict=build_classifier("resnet20", len(SPEC.class_names)).state_dict(),
        scores={},
        config="",
    )


def _stream(path: str, config: Config) -> PlainStream:
    prepare(open_source("digits"), path)
    table = open_table(path)
    splits = split_rows(
        table.labels, table.splits, val_fraction=0.1, test_fraction=0.1, limit_train=IMAGES, seed=0
    )
    train, evaluation = (build_transform("crop", 8, train=train) for train in (True, False))
    return PlainStream(table, splits, train, evaluation, batch_size=config.optim.batch_size, seed=0)


if __name__ == "__main__":
    print(json.dumps(golden_curve(), indent=2))
