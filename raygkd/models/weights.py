"""Weights of a detector that come from another detector or from a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from raygkd.errors import ConfigError, DataError, RunFailed, UserError
from raygkd.models.detectors import Detector, backbone_of
from raygkd.models.files import FORMAT
from raygkd.storage.atomic_files import local_copy, place

BODY = "net.backbone.body."
TORCHVISION_WEIGHTS = ("imagenet", "coco")
# the detectors of torchvision's that a Detector of the same name equals
TRAINED_ON_COCO = ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn")
# in torchvision's networks; their shapes follow the number of classes
CLASS_LAYERS = (
    "head.classification_head.cls_logits.",
    "head.classification_head.module_list.",
    "roi_heads.box_predictor.",
)


def inheritable(student: Detector, teacher: Detector) -> dict[str, nn.Module]:
    """Return path -> the teacher's module, of what its neck and heads can give the student.

    Modules agree when their paths and the shapes of their weights do; where the pyramids have
    different levels none does. The body, which is the backbone without its feature pyramid, is not
    part of it.
    """
    if student.pyramid != teacher.pyramid:
        return {}
    own = _weighted_modules(student)
    return {
        path: module
        for path, module in _weighted_modules(teacher).items()
        if not path.startswith(BODY) and path in own and _shapes(module) == _shapes(own[path])
    }


def inherit(student: Detector, teacher: Detector) -> list[str]:
    """Copy into the student the modules of ``inheritable``; return the paths of the modules copied.

    Raises:
        ConfigError: there is nothing to copy.
    """
    if student.pyramid != teacher.pyramid:
        of_student, of_teacher = (
            ", ".join(map(str, detector.pyramid)) for detector in (student, teacher)
        )
        raise ConfigError(
            "the student cannot inherit from a teacher with different levels (teacher: "
            f"{of_teacher}; student: {of_student}); choose detectors of one family, or pass "
            "--no-inherit"
        )
    sources = inheritable(student, teacher)
    if not sources:
        raise ConfigError(
            "no module of the teacher's neck and heads fits the student; choose detectors of the "
            "same _fpn width, or pass --no-inherit"
        )
    for path, source in sources.items():
        student.get_submodule(path).load_state_dict(source.state_dict())
    return list(sources)


def load_weights(detector: Detector, path: str | os.PathLike[str]) -> list[str]:
    """Load a weights file into a detector, or into its body.

    The file is a model file, or a state dict: of a ``Detector``, of one of torchvision's detectors,
    or of one of torchvision's ResNet or MobileNetV3 classifiers, whose last layers are left out.
    Nothing in it is executed. Layers whose shape follows the number of classes keep the weights
    they have where the file is of another number. An error may leave the detector half loaded.

    Returns:
        The paths of the modules that keep the weights they had.

    Raises:
        DataError: the file cannot be read, holds no weights, or does not fit.
    """
    state, part = _recognised(_read_state(path), path)
    target = detector.get_submodule(part)
    own = target.state_dict()
    fitting = {
        name: tensor
        for name, tensor in state.items()
        if not (name.startswith(CLASS_LAYERS) and name in own and own[name].shape != tensor.shape)
    }
    for name, weight in fitting.items():
        if name in own and own[name].shape != weight.shape:
            found, wanted = (list(tensor.shape) for tensor in (weight, own[name]))
            raise _misfit(path, f"{name} has the shape {found}, not {wanted}")
    try:
        outcome = target.load_state_dict(fitting, strict=False)
    except RuntimeError as error:  # shapes under names that torchvision's networks had before
        raise _misfit(path, "its layers have other shapes") from error
    for name in outcome.missing_keys:
        if name not in state:
            raise _misfit(path, f"it lacks {name}")
    for name in outcome.unexpected_keys:
        raise _misfit(path, f"the detector has no {name}")
    kept = {f"{part}.{name}".rpartition(".")[0] for name in outcome.missing_keys}
    return [
        path
        for path in _weighted_modules(detector)
        if path in kept or not path.startswith(f"{part}.")
    ]


def torchvision_file(name: str, kind: str) -> Path:
    """Return torchvision's weights file for a detector.

    It is fetched into torch's own folder of downloads where it is not there.

    Args:
        name: of the detector.
        kind: "imagenet", of its backbone, or "coco", of the whole detector.

    Raises:
        ConfigError: torchvision has no detector of this name.
        DataError: it cannot be fetched.
    """
    if kind == "coco" and name not in TRAINED_ON_COCO:
        raise ConfigError(
            f"torchvision has no {name} that was trained on COCO; choose "
            f"{' or '.join(TRAINED_ON_COCO)}, or start from imagenet or a file"
        )
    model = name if kind == "coco" else backbone_of(name)
    url = torchvision.models.get_model_weights(model).DEFAULT.url
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except OSError as error:
            raise DataError(
                f"the {kind} weights of {name} cannot be downloaded from {url} ({error}); put the "
                f"file at {path}, or pass a weights file"
            ) from error
    return path


def _weighted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module of the modules that hold parameters themselves."""
    return {
        path: module
        for path, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _misfit(path: str | os.PathLike[str], problem: str) -> DataError:
    return DataError(
        f"{path} does not fit: {problem}; use weights of the same backbone and _fpn width"
    )


def _read_state(path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    try:
        with local_copy(place(path)) as file:
            state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(
            f"cannot read weights {path}: {error.strerror}; pass a weights file, "
            f"{', '.join(TORCHVISION_WEIGHTS)} or none"
        ) from error
    except (UserError, RunFailed):
        raise
    except Exception as error:  # what the unpickler raises on foreign bytes has no common type
        raise DataError(
            f"{path} is damaged, or contains more than weights; save the weights with "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    if isinstance(state, Mapping) and state.get("format") == FORMAT:
        state = state.get("state_dict")
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise DataError(f"{path} is not a state dict; save one with torch.save(model.state_dict())")
    return state


def _recognised(
    state: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> tuple[dict[str, Tensor], str]:
    """Return the weights under the names of the part they are for, and the part's path."""
    body = BODY.removesuffix(".")
    roots = {name.partition(".")[0] for name in state}
    if "net" in roots:
        return {name.removeprefix("net."): weight for name, weight in state.items()}, "net"
    if "backbone" in roots:
        return dict(state), "net"
    if "layer4" in roots:
        return {n: weight for n, weight in state.items() if not n.startswith("fc.")}, body
    if "features" in roots:
        return {
            name.removeprefix("features."): weight
            for name, weight in state.items()
            if name.startswith("features.")
        }, body
    raise DataError(
        f"{path} does not contain weights of a detector, ResNet or MobileNetV3; use the weights of "
        "the detector or its backbone"
    )
