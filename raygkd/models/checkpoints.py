"""Weights files: what training scripts and libraries write, read without running any of it."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raygkd.errors import DataError, RunFailed, UserError
from raygkd.models.loaded_weights import LoadedWeights
from raygkd.storage.atomic_files import local_copy, place

# where training scripts put the weights in what they save, in the order of the search
KEYS = ("state_dict", "model", "model_state_dict", "ema", "state_dict_ema", "net", "teacher")
# what wrappers put in front of the names of weights
PREFIXES = ("module.", "model.", "backbone.", "_orig_mod.", "net.")
# wrappers around weights that are looked into; a mapping may hold itself
DEEPEST = 8
# names shown of those that do not fit
SHOWN = 3
State = dict[str, Tensor]


def read_state(path: str | os.PathLike[str]) -> State:
    """Return the weights in a file, on the CPU; nothing in it is executed.

    Args:
        path: of a .safetensors file, or of one that ``torch.save`` wrote: a state dict, or a
            mapping with one under one of ``KEYS``. An URL works.

    Raises:
        DataError: the file cannot be read, is damaged, or holds something else.
    """
    contents = read_contents(path)
    state = _state_in(contents)
    if state is None:
        held = _few(map(str, contents)) if isinstance(contents, Mapping) else type(contents)
        raise DataError(
            f"{path} contains no weights ({str(held)[:80]}); save them with "
            "torch.save(model.state_dict(), FILE)"
        )
    _check_values(state, path)
    return state


def read_contents(path: str | os.PathLike[str]) -> Any:
    """Return what a weights file contains, on the CPU; nothing in it is executed.

    Raises:
        DataError: the file cannot be read, or is damaged.
    """
    try:
        with local_copy(place(path)) as file:
            return _safetensors(file) if is_safetensors(file) else _pickled(file)
    except FileNotFoundError as error:
        raise DataError(f"cannot read {path}: no such file; pass a weights file") from error
    except OSError as error:
        # torch raises this for a file that is cut off
        if error.errno == errno.EINVAL:
            raise _refused(path, error) from error
        raise DataError(
            f"cannot read {path}: {error.strerror or error}; pass a weights file"
        ) from error
    except (UserError, RunFailed):
        raise
    except Exception as error:  # what the unpickler raises on foreign bytes has no common type
        raise _refused(path, error) from error


def file_digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with local_copy(place(path)) as local, local.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_safetensors(path: Path) -> bool:
    """Return whether a file has the suffix of safetensors."""
    return path.suffix == ".safetensors"


def load_file(
    model: nn.Module, path: str | os.PathLike[str], num_classes: int, licence: str = ""
) -> LoadedWeights:
    """Load a weights file into a classifier.

    A last layer of another number of classes keeps its weights. Nothing is loaded on an error.

    Raises:
        DataError: the file cannot be read, or does not fit.
    """
    new_layers = load_state(model, read_state(path), num_classes, str(path))
    return LoadedWeights(
        source=place(path).name,
        sha256=file_digest(path),
        licence=licence,
        new_layers=tuple(new_layers),
    )


def load_state(
    model: nn.Module, state: Mapping[str, Tensor], num_classes: int, source: str
) -> list[str]:
    """Load weights into a classifier; return the paths of the layers that keep those they had.

    Args:
        model: the classifier.
        state: the weights; prefixes of wrappers are removed where that makes them fit.
        num_classes: of the classifier.
        source: of the weights, for errors.

    Raises:
        DataError: they do not fit.
    """
    own = model.state_dict()
    renamed = best_names(state, own)
    heads = class_layers(model, num_classes)
    # old files do not count batches
    missing = [n for n in own if n not in renamed and not n.endswith("num_batches_tracked")]
    new = [head for head in heads if _has_other_classes(f"{head}.weight", renamed, own)]
    if not new and missing and heads and all(n.startswith(f"{heads[-1]}.") for n in missing):
        new = heads[-1:]
    of_new = tuple(f"{head}." for head in new)
    fitting = {name: tensor for name, tensor in renamed.items() if not name.startswith(of_new)}
    problems = {
        "missing": [name for name in missing if not name.startswith(of_new)],
        "unexpected": [name for name in fitting if name not in own],
        "of another shape": [
            name for name in fitting if name in own and fitting[name].shape != own[name].shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(
            f"{len(names)} {kind} ({_few(names)})" for kind, names in problems.items() if names
        )
        raise DataError(
            f"{source} does not fit {type(model).__name__}, which has {len(own)} tensors: {found}; "
            "use the weights of this model"
        )
    model.load_state_dict(fitting, strict=False)
    return new


def best_names(state: Mapping[str, Tensor], own: Mapping[str, Any]) -> State:
    """Return weights under the names of a model, as far as removing prefixes gives them."""

    def known(names: Iterable[str]) -> int:
        return sum(name in own for name in names)

    best = dict(state)
    improved = True
    while improved:
        improved = False
        for prefix in PREFIXES:
            shorter = {name.removeprefix(prefix): tensor for name, tensor in best.items()}
            # two names that become one would lose a tensor
            if len(shorter) == len(best) and known(shorter) > known(best):
                best, improved = shorter, True
        if not improved and not known(best):
            # a wrapper inside another: what is under the first says nothing yet
            for prefix in PREFIXES:
                if best and all(name.startswith(prefix) for name in best):
                    best = {name.removeprefix(prefix): tensor for name, tensor in best.items()}
                    improved = True
                    break
    return best


def class_layers(model: nn.Module, num_classes: int) -> list[str]:
    """Return the paths of the last two linear layers or convolutions of one output per class.

    Two, because some models have a second one for distillation.
    """
    kinds = (nn.Linear, nn.Conv2d)
    weighted = [(path, part) for path, part in model.named_modules() if isinstance(part, kinds)]
    return [path for path, part in weighted if len(part.weight) == num_classes][-2:]


def _has_other_classes(name: str, found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    return (
        name in found
        and name in own
        and found[name].shape[1:] == own[name].shape[1:]
        and len(found[name]) != len(own[name])
    )


def _few(given: Iterable[str]) -> str:
    names = [name if name.isprintable() else repr(name) for name in given]
    shown = ", ".join(sorted(names)[:SHOWN])
    return f"{shown}, ..." if len(names) > SHOWN else shown


def _safetensors(file: Path) -> State:
    from safetensors.torch import load_file as load_safetensors

    return load_safetensors(file)


def _pickled(file: Path) -> Any:
    with file.open("rb") as opened:
        if zipfile.is_zipfile(opened):
            opened.seek(0)
            if zipfile.ZipFile(opened).testzip() is not None:  # torch does not compare checksums
                raise zipfile.BadZipFile("wrong checksum")
    with torch.serialization.safe_globals(_numpy_scalars()):
        return torch.load(file, map_location="cpu", weights_only=True)


def _numpy_scalars() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Return what pickled numpy scalars such as ``best_prec1`` need, and nothing that runs code."""
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    dtypes = [type(np.dtype(code)) for code in "?bBhHiIlLqQefd"]
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *dtypes]


def _refused(path: str | os.PathLike[str], error: Exception) -> DataError:
    """Return the error for a file that torch does not read."""
    found = re.search(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) (\S+)", str(error))
    if found:
        return DataError(
            f"{path} contains {found[1]}, which is not loaded because it could run code: if you "
            "trust the file, save only its weights: torch.save(torch.load(FILE, "
            'weights_only=False)["state_dict"], "weights.pth")'
        )
    if "TorchScript" in str(error):
        return DataError(
            f"{path} is a TorchScript program; save the state_dict() of the module that it was "
            "made from"
        )
    return DataError(f"{path} is damaged, or not a weights file")


def _check_values(state: State, path: str | os.PathLike[str]) -> None:
    """Refuse weights that are not plain numbers.

    Raises:
        DataError: names the first such tensor.
    """
    for name, tensor in state.items():
        is_weight = name.endswith(("weight", "bias"))
        if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
            problem = "is quantised, sparse, or has no values"
        elif is_weight and not tensor.is_floating_point():
            problem = f"is of type {str(tensor.dtype).removeprefix('torch.')}"
        elif tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            problem = "is not finite, as after diverged training"
        else:
            continue
        raise DataError(f"{path}: {_few([name])} {problem}; use finite floating-point weights")


def _state_in(contents: Any, depth: int = DEEPEST) -> State | None:
    """Return the state dict in what a file holds; None where there is none."""
    if not isinstance(contents, Mapping) or depth == 0:
        return None
    if contents and all(isinstance(part, Tensor) for part in contents.values()):
        return {str(name): part for name, part in contents.items()}
    inner = (_state_in(contents[key], depth - 1) for key in KEYS if key in contents)
    return next((state for state in inner if state), None)
