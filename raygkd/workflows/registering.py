"""Log a student to MLflow, and register it as a version of its model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from raygkd.data.run_images import Images
from raygkd.data.windows import load_window
from raygkd.deploy.modules import DeployedClassifier
from raygkd.models import ModelFile, is_detector, short_name
from raygkd.storage.atomic_files import Place
from raygkd.tracking.tags import IMAGES_TAG
from raygkd.workflows.session import Session

if TYPE_CHECKING:
    from raygkd.tracking.logged_models import LoggedModel

REGISTERED = "raygkd-{dataset}-{student}"


def registered(
    session: Session,
    key: str,
    model: ModelFile,
    path: Place,
    *,
    description: str,
    tags: Mapping[str, str],
) -> LoggedModel | None:
    """Register a student; return its version.

    None if it has no classes, so that it is of no use yet, or MLflow has failed.

    Args:
        session: the open run.
        key: the tracker's key of the MLflow run that the version belongs to.
        model: the student.
        path: of its file.
        description: of the version, as Markdown.
        tags: of the version, besides the images.
    """
    if not model.class_names:
        return None
    dataset, student = (
        re.sub(r"[:/]+", "-", name)
        for name in (session.config.data.dataset, short_name(model.name))
    )
    return session.tracker.model(
        key,
        path if is_detector(model.name) else DeployedClassifier(model),
        _example_images(session.images),
        register_as=REGISTERED.format(dataset=dataset, student=student),
        description=description,
        tags={IMAGES_TAG: session.images.identity, **tags},
    )


def _example_images(images: Images) -> np.ndarray:
    """Return two validation images as float32 (2, 3, S, S) in 0..1."""
    window = load_window(
        images.table,
        images.rows["val"][:2],
        images.transform("val"),
        seed=0,
        epoch=0,
        skip_bad=True,
        exact=False,
    )
    return window.arrays["image"].astype(np.float32) / 255.0
