"""Images as the models of a run get them."""

from __future__ import annotations

import pytest
import torch
from small_runs import random_stream
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from raygkd.assembly.models import untrained_file
from raygkd.assembly.training import build_training, file_normaliser
from raygkd.config import Config, with_settings
from raygkd.data.spec import ImageSpec


def resized(images: Tensor, side: int, mode: InterpolationMode) -> Tensor:
    return resize(images, [side, side], mode, antialias=True).clamp(0, 1)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("test_vit", InterpolationMode.BICUBIC), ("resnet18.tv_in1k", InterpolationMode.BILINEAR)],
)
def test_images_are_resized_as_the_weights_saw_them(name: str, mode: InterpolationMode) -> None:
    spec = ImageSpec(
        class_names=("a", "b"),
        image_size=(32, 32),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        teacher_size=(64, 64),
        view_size=(48, 48),
    )
    file = untrained_file(f"timm:{name}", spec.of_teacher())
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in (file.mean, file.std))
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    found = file_normaliser(file, torch.device("cpu"))(images)
    torch.testing.assert_close(found * std + mean, resized(images, 64, mode))
    training = build_training(
        with_settings(Config(), {"student": f"timm:{name}", "student_weights": "none"}),
        spec=spec,
        teacher_file=file,
        stream=random_stream(),
        device=torch.device("cpu"),
    )
    assert torch.equal(training.teacher_normalise(images), found)
    own = training.normalise(images) * std + mean
    torch.testing.assert_close(own, resized(images, 32, mode))
