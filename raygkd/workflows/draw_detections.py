"""Pictures of detections, for the run's folder and MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from raygkd.assembly.training import file_normaliser
from raygkd.data.windows import decode_rows, targets_of
from raygkd.engine.tasks import on_image, pixels
from raygkd.models import ModelFile, build_from_file
from raygkd.report.detection_pictures import draw_detections, draw_per_class
from raygkd.workflows.session import Session

# images on the sheet
SHEET = 12


def draw(
    session: Session, key: str, model: ModelFile, scores: Mapping[str, Mapping[str, Any]]
) -> None:
    """Draw a model's detections on test images, and the average precision of each class.

    Args:
        session: the open run.
        key: of the MLflow run that gets the pictures.
        model: whose detections are drawn.
        scores: role -> scores on the test split, of every model that is compared.
    """
    sheet, bars = (session.folder / name for name in ("detections.png", "per_class.png"))
    rows = session.images.rows["test"][:SHEET]
    transform = session.images.transform("test")
    detector = build_from_file(model)
    cpu = torch.device("cpu")
    normalise = file_normaliser(model, cpu)
    images, objects, found = [], [], []
    decoded = decode_rows(session.images.table, rows, skip_bad=True)
    for image_CHW, boxes in zip(decoded, targets_of(session.images.table, rows)):
        if image_CHW is None:
            continue
        sample = transform.sample(image_CHW, boxes, seed=0, epoch=0, row=0)
        with torch.no_grad():
            batch = {"image": torch.from_numpy(sample["image"])[None]}
            [output] = detector(normalise(pixels(batch, cpu)))
        found.append(on_image(output, float(sample["ratio"])))
        images.append(image_CHW.permute(1, 2, 0).numpy())
        objects.append(boxes)
    names = session.images.spec.class_names
    draw_detections(sheet, images, objects, found, names)
    draw_per_class(
        bars, names, {role.replace("_", " "): of["per_class50"] for role, of in scores.items()}
    )
    for path in (sheet, bars):
        session.tracker.figure(key, path)
