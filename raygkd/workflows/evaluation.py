"""Scoring finished models on prepared images: ``raygkd evaluate``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from raygkd import build
from raygkd.config import Config, with_settings
from raygkd.errors import ConfigError, UserError
from raygkd.inputs import open_images
from raygkd.models import build_from_file, count_parameters, load_model_file
from raygkd.rayrun import ingest, worker
from raygkd.rayrun.cluster import cluster
from raygkd.report.console import progress
from raygkd.workflows.session import output_folder


def evaluate(
    config: Config, models: Sequence[str], split: str, *, console: Console
) -> dict[str, Any]:
    """Score model files on a split (``raygkd evaluate``); return what ``--json`` prints.

    Args:
        config: the data, and how it is read.
        models: paths of files that raygkd wrote, of models for the same size of image.
        split: "train", "val" or "test".
        console: for progress.

    Raises:
        UserError: files and images that do not go together.
    """
    started = time.monotonic()
    files = {path: load_model_file(path) for path in models}
    sides = {file.image_size[0] for file in files.values()}
    if len(sides) > 1:
        shown = ", ".join(f"{path} {file.image_size[0]}" for path, file in files.items())
        raise ConfigError(f"MODEL: of images of different sides ({shown}): evaluate them by turns")
    config = with_settings(config, {"image_size": sides.pop()})
    output = output_folder(config.output.output)
    with progress(console, "preparing images") as advance:
        images = open_images(config.data, seed=config.optim.seed, output=output, progress=advance)
    for path, file in files.items():
        try:
            build.check_teacher(file, images.spec)
        except UserError as error:
            raise type(error)(f"MODEL {path}: {error}") from error
    with cluster(config.cluster.address):
        with progress(console, "decoding images") as advance:
            shared = ingest.share(images, config.data.cache_mb, advance)
        scores = worker.score_models(
            files,
            shared,
            split,
            batch_size=config.optim.batch_size,
            gpus=min(1.0, config.cluster.gpus_per_worker),
        )
    rows = {
        path: {
            "model": file.name,
            "parameters": count_parameters(build_from_file(file)),
            "scores": scores[path],
        }
        for path, file in files.items()
    }
    return {
        "split": split,
        "images": len(images.rows[split]),
        "models": rows,
        "seconds": round(time.monotonic() - started, 1),
    }
