"""Images to compare a finished model on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from raygkd.assembly.compatibility import check_teacher
from raygkd.config import Config, from_mapping, recorded_settings, with_settings
from raygkd.data.run_images import Images, open_images
from raygkd.errors import DataError, UserError
from raygkd.metrics.ranking import NEAREST
from raygkd.models import ModelFile
from raygkd.report.console import progress
from raygkd.storage.atomic_files import Place, place


def given_images(model_file: ModelFile, data: str, console: Console) -> Images:
    """Return the images that ``--data`` names, without the unreadable ones.

    Args:
        model_file: of the model.
        data: a Parquet file or a folder of them.
        console: for progress.

    Raises:
        UserError: there are none, or they have other classes than the model.
    """
    settings = {"dataset": "parquet", "data_dir": data, "skip_bad": True}
    return _opened(with_settings(Config(), settings), model_file, Path(), console)


def own_images(model_file: ModelFile, console: Console) -> Images:
    """Return the images that a model was trained on, with the splits of its run.

    Args:
        model_file: of the model.
        console: for progress.

    Raises:
        UserError: they no longer exist; the message suggests ``--data``.
    """
    tree = recorded_settings(model_file.config, where="the model file's settings")
    if not tree:
        raise DataError("the model file does not record its data; pass --data")
    try:
        config = from_mapping(tree)
        output = place(config.output.output)
        if output.is_dir():
            return _opened(config, model_file, output, console)
    except UserError as error:
        raise type(error)(f"{error}; pass --data") from error
    raise DataError(f"the output folder of its run, {output}, does not exist; pass --data")


def _opened(config: Config, model_file: ModelFile, output: Place, console: Console) -> Images:
    # without a teacher's size, the images have the size of the model's own input
    side = model_file.image_size[0]
    settings: dict[str, Any] = {"image_size": side, "teacher_image_size": None}
    if config.data.score in NEAREST:
        # it ranks students while they are trained
        settings["score"] = "auto"
    with progress(console, "preparing images") as advance:
        images = open_images(
            with_settings(config, settings).data,
            seed=config.optim.seed,
            output=output,
            progress=advance,
        )
    check_teacher(model_file, images.spec)
    return images
