"""Detectors on timm's models: their pyramids, training, names and weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from raygkd.assembly.models import start_from_weights, untrained_file
from raygkd.assembly.student_objective import build_objective
from raygkd.config import Config, with_settings
from raygkd.data.spec import ImageSpec
from raygkd.engine import Teacher
from raygkd.errors import ConfigError
from raygkd.models import (
    Detector,
    build_from_file,
    build_model,
    check_model_name,
    feature_shapes,
    is_detector,
    save_model_file,
    stage_modules,
)

SPEC = ImageSpec(
    class_names=("cat", "dog"),
    image_size=(64, 64),
    mean=(0.5,) * 3,
    std=(0.2,) * 3,
    task="detection",
)
TARGETS = [
    {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])},
    {"boxes": torch.tensor([[4.0, 30.0, 28.0, 60.0]]), "labels": torch.tensor([0])},
]


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["fasterrcnn", "retinanet", "fcos", "ssdlite"])
def test_levels_are_those_of_the_family(family: str) -> None:
    name = f"{family}_timm:resnet10t_fpn16"
    assert is_detector(name)
    model = build_model(name, 2, (64, 64))
    own = build_model(f"{family}_resnet18_fpn16", 2, (64, 64))
    levels = list(stage_modules(own))
    assert list(stage_modules(model)) == levels
    assert feature_shapes(model, levels, (64, 64)) == feature_shapes(own, levels, (64, 64))


@pytest.mark.parametrize(
    "backbone", ["resnet10t", "test_convnext", "swin_tiny_patch4_window7_224", "test_efficientnet"]
)
def test_a_step_distils_into_every_parameter(backbone: str) -> None:
    settings = {
        "student": f"retinanet_timm:{backbone}_fpn16",
        "teacher": "retinanet_resnet18_fpn16",
    }
    config = with_settings(Config(), {**settings, "weights_unit": "loss"})
    teacher = build_model(settings["teacher"], 2, (64, 64))
    objective = build_objective(config, SPEC, teacher).train()
    assert objective.levels == (3, 4, 5, 6, 7)
    output = Teacher(teacher, {level: level for level in objective.levels})(images())
    terms, _ = objective(images(), TARGETS, output)
    objective.total(terms).backward()
    idle = [name for name, one in objective.named_parameters() if one.grad is None]
    assert idle == []
    assert all(one.grad.isfinite().all() for one in objective.parameters() if one.grad is not None)


@pytest.mark.parametrize(
    ("backbone", "options"),
    [("resnet10t", {}), ("swin_tiny_patch4_window7_224", {"img_size": 64})],
)
def test_a_backbone_starts_from_its_file_and_a_detector_from_its_own(
    tmp_path: Path, backbone: str, options: dict[str, int]
) -> None:
    torch.manual_seed(1)
    theirs = timm.create_model(backbone, num_classes=5, **options)
    torch.save(theirs.state_dict(), tmp_path / "backbone.pth")
    name = f"fcos_timm:{backbone}_fpn16"
    settings = {"student": name, "student_weights": str(tmp_path / "backbone.pth")}
    model = build_model(name, 2, (64, 64))
    start_from_weights(with_settings(Config(), settings), model, 2)
    body = model.get_submodule("net.backbone.body.net").state_dict()
    assert body
    assert all(torch.equal(theirs.state_dict()[key], one) for key, one in body.items())

    file = untrained_file(name, SPEC, seed=3)
    assert file.mean == pytest.approx((0.485, 0.456, 0.406))
    save_model_file(tmp_path / "model.pt", file)
    settings["student_weights"] = str(tmp_path / "model.pt")
    start_from_weights(with_settings(Config(), settings), model, 2)
    assert all(torch.equal(file.state_dict[key], one) for key, one in model.state_dict().items())
    found = build_from_file(file)(images())
    assert isinstance(model, Detector)
    assert torch.equal(found[0]["boxes"], model.eval()(images())[0]["boxes"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "fcos_timm:resnet18",
            r"unknown fcos_timm detector 'resnet18'; did you mean 'resnet18_fpn'",
        ),
        ("fcos_tim:resnet18_fpn16", "did you mean 'fcos_timm:resnet18_fpn16'"),
        ("fcos_timm:resnet18_fpn20", "WIDTH a multiple of 16 from 16 to 512"),
        (
            "fcos_timm:resnet81_fpn16",
            "unknown fcos_timm detector 'resnet81_fpn16'; did you mean 'resnet",
        ),
        ("fcos_timm:resnet18.a9_fpn", "unknown fcos_timm detector 'resnet18.a9'; did you mean 'r"),
    ],
)
def test_wrong_names_are_refused_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model_name(name)


def test_a_model_of_one_stride_has_no_pyramid() -> None:
    with pytest.raises(
        ConfigError, match="test_vit has maps with strides 16, but the pyramid needs"
    ):
        build_model("retinanet_timm:test_vit_fpn16", 2, (64, 64))
