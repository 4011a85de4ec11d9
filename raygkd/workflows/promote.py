"""Compare the versions of a registered model, and promote the better: ``raygkd promote``."""

from __future__ import annotations

import re
import time
from typing import Any

from rich.console import Console

from raygkd.assembly.compatibility import check_teacher
from raygkd.config import DataConfig, OptimConfig
from raygkd.data.run_images import Images
from raygkd.errors import ConfigError, TrackingError, UserError
from raygkd.metrics.ranking import rank
from raygkd.models import (
    ModelFile,
    build_from_file,
    count_parameters,
    load_model_file,
    short_name,
)
from raygkd.rayrun import image_stream, worker
from raygkd.rayrun.cluster import cluster_if
from raygkd.report.console import progress
from raygkd.tracking.model_registry import (
    CHALLENGER,
    CHAMPION,
    Registered,
    aliases,
    decide,
    registered,
)
from raygkd.tracking.store import chosen_uri
from raygkd.tracking.tags import IMAGES_TAG
from raygkd.workflows.model_images import given_images, own_images
from raygkd.workflows.model_locator import registered_file

# tolerance for rounding when a lead is compared with the margin
ROUNDING = 1e-9


def promote(
    name: str,
    *,
    margin: float,
    data: str | None,
    address: str | None,
    output: str,
    tracking_uri: str | None,
    console: Console,
) -> dict[str, Any]:
    """Make the challenger of a registered model its champion, if it is better on the test split.

    Both are scored on the same images. Returns what ``--json`` prints; its "difference" is the
    challenger's lead, which is positive for a better score.

    Args:
        name: of the registered model.
        margin: minimum lead of the challenger; with 0 any gain is enough.
        data: Parquet images, whose test split is scored; None for those of the challenger's run.
        address: of a running cluster; None starts one here.
        output: folder of the runs.
        tracking_uri: of the MLflow store; None for the output folder's.
        console: for progress.

    Raises:
        UserError: there are no two versions, or no images to compare them on.
    """
    started = time.monotonic()
    uri = chosen_uri(tracking_uri, output)
    versions = _versions(name, uri)
    files = {
        role: load_model_file(registered_file(f"models:/{name}/{one.version}", one))
        for role, one in versions.items()
    }
    images = _images(files, data, console)
    scores = _scores(files, images, address, console)
    score = images.spec.score
    ahead = rank(scores[CHALLENGER], score) - rank(scores[CHAMPION], score)
    promoted = is_better(ahead, margin)
    identities = {one.tags.get(IMAGES_TAG) for one in versions.values()}
    result = {
        "name": name,
        "images": len(images.rows["test"]),
        "measure": images.spec.score,
        "margin": margin,
        "difference": ahead,
        "promoted": promoted,
        # what one of them has trained on may be among the other's test images
        "same_splits": len(identities) == 1 and None not in identities,
        "versions": {
            role: {
                "version": one.version,
                "model": short_name(files[role].name),
                "parameters": count_parameters(build_from_file(files[role])),
                "run_id": one.run_id,
                "test_score": scores[role],
            }
            for role, one in versions.items()
        },
    }
    decide(versions[CHALLENGER], uri, promoted=promoted, tags=_told(result))
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


def is_better(ahead: float, margin: float) -> bool:
    """Return whether a lead in score reaches the margin.

    Args:
        ahead: the lead.
        margin: the minimum lead; an equal score is not better, even with 0.
    """
    return ahead > 0 and ahead >= margin - ROUNDING


def _versions(name: str, uri: str) -> dict[str, Registered]:
    """Return champion and challenger.

    Raises:
        ConfigError: an invalid name.
        TrackingError: there is no such model, or one of the two is missing.
    """
    if not re.fullmatch(r"[^/@:]+", name):
        raise ConfigError(
            f"NAME {name}: must be the name of a registered model, such as raygkd-digits-resnet8"
        )
    held = aliases(name, uri)
    if CHAMPION not in held:
        raise TrackingError(
            f"NAME {name}: no version has the alias {CHAMPION}; set it in MLflow (the first "
            "version registered by a search gets it automatically)"
        )
    if CHALLENGER not in held:
        raise TrackingError(
            f"NAME {name}: has no {CHALLENGER}, version {held[CHAMPION]} is the {CHAMPION}: the "
            "winner of the next 'raygkd tune' with this data set and student becomes one"
        )
    return {
        role: registered(f"models:/{name}/{held[role]}", uri) for role in (CHAMPION, CHALLENGER)
    }


def _images(files: dict[str, ModelFile], data: str | None, console: Console) -> Images:
    """Return the images, checked against both models.

    Raises:
        UserError: there are none, or a model has other classes.
    """
    file = files[CHALLENGER]
    images = own_images(file, console) if data is None else given_images(file, data, console)
    champion = files[CHAMPION]
    try:
        check_teacher(champion, images.spec)
        if champion.image_size != images.spec.image_size:
            raise ConfigError(
                f"takes images of {champion.image_size[0]} pixels and the {CHALLENGER} of "
                f"{images.spec.image_size[0]}: they cannot be compared on the same images"
            )
    except UserError as error:
        raise type(error)(f"{CHAMPION}: {error}") from error
    return images


def _scores(
    files: dict[str, ModelFile], images: Images, address: str | None, console: Console
) -> dict[str, float]:
    """Return role -> score on the test split."""
    is_streamed = not image_stream.fits_in_memory(images, DataConfig.cache_mb)
    with cluster_if(is_streamed, address):
        with progress(console, "decoding images") as advance:
            shared = image_stream.share(images, DataConfig.cache_mb, advance)
        with progress(console, "scoring") as advance:
            scores = worker.score_models(
                files,
                shared,
                "test",
                batch_size=OptimConfig.batch_size,
                gpus=0.0,
                progress=advance,
            )
    return {role: scores[role]["score"] for role in files}


def _told(result: dict[str, Any]) -> dict[str, str]:
    """Return the tags of the comparison for the challenger's version."""
    versions = result["versions"]
    champion, challenger = versions[CHAMPION], versions[CHALLENGER]
    outcome = "promoted" if result["promoted"] else "not promoted"
    return {
        "raygkd.promotion": (
            f"{outcome}: {result['measure']} {challenger['test_score']:.4f} against "
            f"{champion['test_score']:.4f} of version {champion['version']} on "
            f"{result['images']} test images, margin {result['margin']:g}"
        )
    }
