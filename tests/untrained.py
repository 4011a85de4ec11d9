"""Model files of random weights."""

from __future__ import annotations

import torch

from raygkd.build import ImageSpec, new_model
from raygkd.models import ModelFile


def untrained_file(name: str, spec: ImageSpec, seed: int = 0) -> ModelFile:
    """Return the file of an untrained model for images; torch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_model(name, spec)
    return ModelFile(
        name=name,
        class_names=spec.class_names,
        image_size=spec.image_size,
        mean=spec.mean,
        std=spec.std,
        state_dict=model.state_dict(),
        scores={},
        config="",
    )
