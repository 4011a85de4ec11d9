"""Model files: one model with what is needed to use it."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from raygkd.errors import DataError, RunFailed, UserError, brief
from raygkd.models.by_name import build_model
from raygkd.models.families import source_file
from raygkd.storage.atomic_files import Place, local_copy, place, whole_file
from raygkd.storage.reading import check_type

FORMAT = "raygkd model 1"
# pixels
LARGEST_SIDE = 4096
_Three = tuple[float, float, float] | list[float]
# the types of what a file holds
SHAPE = {
    "name": str,
    "class_names": tuple[str, ...] | list[str],
    "image_size": tuple[int, int] | list[int],
    "mean": _Three,
    "std": _Three,
    "state_dict": dict[str, Tensor],
    "scores": dict[str, float | None],
    "config": str,
    "weights?": dict[str, str],
    "ranges?": dict[str, tuple[float, float] | list[float]],
}


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelFile:
    """A classifier or detector saved for use, alone: no teacher, adapters or optimiser.

    Attributes:
        name: as :func:`raygkd.models.build_model` takes it.
        class_names: in the order of the logits, or of a detector's labels; () of a model that
            learned feature maps alone, whose one output means nothing.
        image_size: height and width of the input in pixels.
        mean, std: per channel, of pixels scaled to 0..1.
        state_dict: the model's parameters and buffers.
        scores: what it reached, by the name of the measure.
        config: the configuration of the run that made it, as YAML.
        weights: what it started from, see ``LoadedWeights.to_mapping``; empty for random weights.
        ranges: of a model that was trained in 8 bits: tensor of its exported graph -> smallest and
            largest value; empty for others.
    """

    name: str
    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    state_dict: dict[str, Tensor]
    scores: dict[str, float]
    config: str
    weights: dict[str, str] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)


def save_model_file(path: str | os.PathLike[str] | Place, model_file: ModelFile) -> None:
    """Write a model file; a reader sees the old file or the whole new one, never a part.

    If its name is FILE.py:FUNCTION, a copy of the file is put beside it.

    Raises:
        StorageError: the file cannot be written.
        DataError: the path is a folder, or the disk fails in another way.
    """
    contents = {one.name: getattr(model_file, one.name) for one in fields(ModelFile)}
    contents["state_dict"] = {
        name: tensor.detach().cpu() for name, tensor in model_file.state_dict.items()
    }
    source = source_file(model_file.name)
    try:
        if source is not None:
            beside = place(path).parent / place(source).name
            if beside != place(source):
                with whole_file(beside) as temporary:
                    temporary.write_bytes(place(source).read_bytes())
        with whole_file(path) as temporary, temporary.open("wb") as file:
            torch.save({"format": FORMAT, **contents}, file)
    except OSError as error:
        raise DataError(f"cannot write model file {path}: {error.strerror}") from error


def load_model_file(path: str | os.PathLike[str] | Place) -> ModelFile:
    """Read a model file, with its tensors on the CPU; nothing in it is executed.

    If its name is FILE.py:FUNCTION and that file is gone, the copy beside the model file is named.

    Raises:
        DataError: there is no such file, it cannot be read, or it is not a model file.
        ConfigError: a URL that cannot be used.
        StorageError: the store does not give it.
    """
    advice = "pass a file written by 'raygkd teacher', 'raygkd train' or 'raygkd tune'"
    try:
        contents = read_tensors(path)
    except OSError as error:
        raise DataError(f"cannot read model file {path}: {error.strerror}; {advice}") from error
    except (UserError, RunFailed):
        raise
    except Exception as error:  # what the unpickler raises on foreign bytes has no common type
        raise DataError(f"{path} is damaged, or not a model file; {advice}") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise DataError(f"{path} is not a model file of this version ({FORMAT!r}); {advice}")
    names = [one.name for one in fields(ModelFile)]
    optional = ("weights", "ranges")
    missing = [name for name in names if name not in contents and name not in optional]
    if missing:
        raise DataError(f"model file {path} lacks {', '.join(missing)}; {advice}")
    known = {name: contents[name] for name in names if name in contents}
    try:
        check_type(known, SHAPE)
        _check_values(known)
    except ValueError as error:
        raise DataError(f"model file {path} is damaged: {error}; {advice}") from error
    return ModelFile(**{**known, "name": _found_name(contents["name"], path)})


def _check_values(known: Mapping[str, Any]) -> None:
    """Refuse values of a model file that no model can have; ValueError names the first."""
    names = known["class_names"]
    if len(set(names)) < len(names) or not all(map(str.strip, names)):
        raise ValueError(f"class_names {brief(names)} must be different, and not empty")
    size = known["image_size"]
    if len(size) != 2 or not all(1 <= side <= LARGEST_SIDE for side in size):
        raise ValueError(f"image_size {brief(size)} must be two sides up to {LARGEST_SIDE}")
    for name in ("mean", "std"):
        values = known[name]
        finite = len(values) == 3 and all(map(math.isfinite, values))
        if not finite or (name == "std" and min(values) <= 0):
            above = " above 0" if name == "std" else ""
            raise ValueError(f"{name} {brief(values)} must be three finite numbers{above}")
    check_finite(known["state_dict"])
    for name, values in known.get("ranges", {}).items():
        if len(values) != 2 or not all(map(math.isfinite, values)) or values[0] > values[1]:
            raise ValueError(f"ranges {brief(name)} {brief(values)} must be two rising numbers")


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not plain finite numbers; ValueError names the first tensor."""
    for name, tensor in state.items():
        shown = brief(name, quoted=False)
        if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
            raise ValueError(f"its weights {shown} are quantised, sparse, or have no values")
        if tensor.is_complex():
            raise ValueError(f"its weights {shown} are complex")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"its weights {shown} are not finite, as after diverged training")


def _found_name(name: str, path: str | os.PathLike[str] | Place) -> str:
    """Return a model's name; of FILE.py:FUNCTION with the file that is there."""
    source = source_file(name)
    if source is None or place(source).exists():
        return name
    beside = place(path).parent / place(source).name
    return f"{beside}:{name.rpartition(':')[2]}" if beside.exists() else name


def read_tensors(path: str | os.PathLike[str] | Place) -> Any:
    """Return what ``torch.save`` wrote, on the CPU; nothing in it is executed.

    Raises:
        OSError: the file cannot be read.
        Exception: it is damaged or holds more than tensors and plain values; of many types.
    """
    with local_copy(place(path)) as local, local.open("rb") as file:
        if zipfile.ZipFile(file).testzip() is not None:  # torch.load does not compare checksums
            raise zipfile.BadZipFile("wrong checksum")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def build_from_file(model_file: ModelFile) -> nn.Module:
    """Return the model of a model file in eval mode, on the CPU.

    Raises:
        ConfigError: its name is unknown.
        DataError: its weights are not those of the model it names.
    """
    num_classes = max(1, len(model_file.class_names))
    model = build_model(model_file.name, num_classes, model_file.image_size)
    try:
        model.load_state_dict(model_file.state_dict)
    except RuntimeError as error:
        raise DataError(
            f"the weights in the model file do not fit {model_file.name!r} with {num_classes} "
            "classes; train it again with this version"
        ) from error
    return model.eval()
