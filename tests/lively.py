"""Models of random weights that behave like trained ones: they find things, and have statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raygkd.assembly.models import untrained_file
from raygkd.data.spec import ImageSpec
from raygkd.models import ModelFile, build_from_file

CLASSES = ("cat", "dog", "eel")


def classifier_file(name: str = "resnet8", side: int = 12) -> ModelFile:
    """Return a classifier whose batch normalisation is not the identity."""
    spec = ImageSpec(
        class_names=CLASSES,
        image_size=(side, side),
        mean=(0.3, 0.5, 0.4),
        std=(0.2, 0.3, 0.25),
    )
    return _changed(untrained_file(name, spec), _with_statistics)


def detector_file(family: str, side: int = 64, backbone: str = "mobilenet_v3_small") -> ModelFile:
    """Return a detector that finds dozens of boxes in noise, of scores that differ."""
    spec = ImageSpec(
        class_names=CLASSES,
        image_size=(side, side),
        mean=(0.3, 0.5, 0.4),
        std=(0.2, 0.3, 0.25),
        task="detection",
    )
    return _changed(untrained_file(f"{family}_{backbone}_fpn16", spec), _that_finds)


def _changed(model_file: ModelFile, change: Any) -> ModelFile:
    model = build_from_file(model_file)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        change(model, generator)
    model_file.state_dict.update(model.state_dict())
    return model_file


def _with_statistics(model: nn.Module, generator: torch.Generator) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                assert tensor is not None
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            for tensor in (module.bias, module.running_mean):
                assert tensor is not None
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))


def _that_finds(model: nn.Module, generator: torch.Generator) -> None:
    net: Any = model.net
    if hasattr(net, "rpn"):
        net.rpn.head.cls_logits.weight.mul_(8)
        net.rpn.head.bbox_pred.weight.mul_(4)
        net.roi_heads.box_predictor.cls_score.weight.mul_(12)
        net.roi_heads.box_predictor.cls_score.bias[0] = 1.0
        return
    for name, parameter in net.head.named_parameters():
        if name.endswith(("cls_logits.bias", "classification_head.module_list.0.1.bias")):
            parameter.fill_(-2.3)
        elif "cls_logits.weight" in name or ("bbox" in name and parameter.ndim > 1):
            parameter.mul_(3)
