"""Forward passes that find a model's levels: how many there are, and models that fail in them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from torch import Tensor, nn

from raygkd.errors import ConfigError, ImageSizeError
from raygkd.models import FeatureTap, check_levels, feature_shapes, stage_modules


class Counted(nn.Module):
    """Two stages that count their forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = stage(3, 8), stage(8, 12)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3))
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.second(self.first(images)))


def stage(channels: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out, 3, 2, 1), nn.ReLU(), nn.Conv2d(out, out, 1))


class Strange(Counted):
    """Does something in its forward pass that a person may do."""

    def __init__(self, what: str):
        super().__init__()
        self.what = what

    def forward(self, images: Tensor) -> Tensor:
        if self.what == "values":
            images = images * (1.0 if images.mean().item() < 9 else 2.0)
        if self.what == "bug":
            raise KeyError("scale")
        if self.what == "no text":
            raise Mute
        if self.what == "size":
            assert images.shape[2] == 224
        return super().forward(images)


class Mute(Exception):
    def __str__(self) -> str:
        raise AttributeError("no text")


def test_a_model_is_run_once_for_each_size_of_images() -> None:
    model = Counted()
    for _ in range(2):
        stage_modules(model)
        check_levels([1, 2], model, "student")
        assert feature_shapes(model, [1, 2], (64, 64)) == {1: (8, 32, 32), 2: (12, 16, 16)}
        FeatureTap(model, [2]).remove()
    assert model.calls == 2


def test_a_changed_model_is_run_again_and_a_deleted_one_forgotten() -> None:
    model = Counted()
    assert feature_shapes(model, [2], (64, 64)) == {2: (12, 16, 16)}
    model.second = nn.Sequential(nn.MaxPool2d(2), stage(8, 12))
    assert feature_shapes(model, [2], (64, 64)) == {2: (12, 8, 8)}
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_model_that_looks_at_values_has_levels() -> None:
    assert feature_shapes(Strange("values"), [1], (64, 64)) == {1: (8, 32, 32)}


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("bug", ConfigError, r"Strange fails on .* test_probes\.py, line \d+: KeyError: 'scale'$"),
        ("no text", ConfigError, r"test_probes\.py, line \d+: Mute$"),
        ("size", ImageSizeError, r"cannot take images of 64 x 64 .*, line \d+: AssertionError"),
    ],
)
def test_what_fails_is_told_with_its_place(what: str, kind: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        feature_shapes(Strange(what), (), (64, 64))
    assert type(caught.value) is kind
