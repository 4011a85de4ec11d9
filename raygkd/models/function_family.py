"""Models that a function of a person's own returns: FILE.py:FUNCTION or package.module:function."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from raygkd.errors import ConfigError, RunFailed, UserError, near, text_of
from raygkd.models.families import ModelFamily, short_name, source_file
from raygkd.models.inputs import ModelInput
from raygkd.registry import FAMILIES
from raygkd.storage.atomic_files import local_copy, place


@FAMILIES.register("function")
class Functions(ModelFamily):
    """A function of the number of classes that returns a torch module.

    The module that the function is in may say what its models expect: ``MEAN`` and ``STD``, three
    numbers each for pixels in 0..1, and ``SIZE``, the side of the input in pixels.
    """

    def names(self) -> Sequence[str]:
        """Return nothing: any function can be named."""
        return ()

    def check_name(self, name: str) -> None:
        """Refuse a function that does not exist; its file is run, the function is not called."""
        function_of(name)

    def build(self, name: str, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
        """Return what the function returns for the number of classes; its output as logits."""
        with errors_told(name):
            model = function_of(name)(num_classes)
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"{short_name(name)} returned {type(model).__name__}, not a torch.nn.Module; "
                "return the model"
            )
        _check_new(model, name)
        model.register_forward_hook(functools.partial(_as_logits, short_name(name), num_classes))
        return model

    def inputs(self, name: str) -> ModelInput:
        """Return what ``MEAN``, ``STD`` and ``SIZE`` of the function's module say."""
        module = module_of(name)
        values = {what: _numbers(module, name, what) for what in ("MEAN", "STD")}
        if (values["MEAN"] is None) != (values["STD"] is None):
            raise ConfigError(f"{short_name(name)}: MEAN and STD: define both, or neither")
        size = getattr(module, "SIZE", None)
        if size is not None and (type(size) is not int or size < 1):
            raise ConfigError(f"{short_name(name)}: SIZE {size!r}: must be a number of pixels")
        return ModelInput((size, size) if size else None, values["MEAN"], values["STD"])


def function_of(name: str) -> Callable[[int], Any]:
    """Return the function of a model's name.

    Raises:
        ConfigError: its module cannot be imported, or has no such function.
    """
    wanted = name.rpartition(":")[2]
    module = module_of(name)
    found = getattr(module, wanted, None)
    if not callable(found):
        own = [one for one, value in vars(module).items() if callable(value) and one[:1] != "_"]
        raise ConfigError(
            f"{short_name(name)}: there is no function {wanted!r}{near(wanted, own)} (it has "
            f"{', '.join(own) or 'none'})"
        )
    return found


def module_of(name: str) -> ModuleType:
    """Return the module that a model's function is in.

    Raises:
        ConfigError: there is no such module or file, or it cannot be imported.
    """
    path = source_file(name)
    if path is not None:
        return _from_file(name, path)
    with errors_told(name):
        return importlib.import_module(name.rpartition(":")[0])


@contextlib.contextmanager
def errors_told(name: str) -> Iterator[None]:
    """Raise what a person's own code raises as one line, with the place in it.

    Raises:
        ConfigError: the block raised something other than a user error, or ended the process, as a
            script with a command line of its own does.
    """
    try:
        yield
    except (UserError, RunFailed):
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        path = str(source_file(name))
        own = [frame for frame in frames if frame.filename == str(place(path))]
        where = (own or frames)[-1]
        file, line = where.filename, where.lineno
        if isinstance(error, SyntaxError) and error.filename:
            file, line = error.filename, error.lineno
        reason = text_of(error)
        hint = ""
        if isinstance(error, SystemExit):
            hint = "; put what the script runs below if __name__ == '__main__'"
        elif isinstance(error, ModuleNotFoundError) and path != "None":
            hint = (
                ": only this file is copied to the run; put the whole model into it, or install "
                "the module"
            )
        raise ConfigError(
            f"{short_name(name)}: {short_name(f'{file}:x')[:-2]}, line {line}: {reason}{hint}"
        ) from error


def _from_file(name: str, path: str) -> ModuleType:
    """Return the module of a file; one content is one module, wherever its copies are."""
    try:
        with local_copy(place(path)) as file:
            source = file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{name}: cannot read {path}: {error.strerror or error}; correct the path, or, if a "
            "model file needs it, restore it or put it next to the model file"
        ) from error
    unique = f"raygkd_model_{hashlib.sha256(source).hexdigest()[:16]}"
    if unique not in sys.modules:
        module = ModuleType(unique)
        module.__file__ = str(place(path))
        # classes look up their own module while they are made
        sys.modules[unique] = module
        try:
            with errors_told(name):
                exec(compile(source, module.__file__, "exec"), vars(module))
        except BaseException:
            del sys.modules[unique]
            raise
    return sys.modules[unique]


def _check_new(model: nn.Module, name: str) -> None:
    """Check that a model can be trained and copied like other models.

    Raises:
        ConfigError: the function returned this very model before, or parameters of another kind.
    """
    short = short_name(name)
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(f"{short} returned a TorchScript program; return the module before it")
    if getattr(model, "raygkd_is_built", False):
        raise ConfigError(
            f"{short} returned the same model twice: student and teacher would share its weights; "
            "build a new one in every call"
        )
    for path, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ConfigError(f"{short}: {path} has no shape yet; do not use lazy layers")
        if parameter.is_meta or parameter.dtype != torch.float32:
            kind = f"{str(parameter.dtype).removeprefix('torch.')} on {parameter.device}"
            raise ConfigError(f"{short}: {path} is {kind}; return a float32 model on the CPU")
    model.raygkd_is_built = True  # type: ignore[assignment]


def _as_logits(name: str, num_classes: int, module: nn.Module, inputs: Any, output: Any) -> Tensor:
    """Forward hook: return logits (B, K) of what a model returns."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ConfigError(
            f"{name}: the model returns {type(output).__name__}: it must return logits, a tensor "
            f"(B, {num_classes}), or an object with .logits"
        )
    if logits.ndim != 2 or logits.shape[1] != num_classes:
        raise ConfigError(
            f"{name}: the model returns a tensor {tuple(logits.shape)}: it must be (B, "
            f"{num_classes}), one number for each class"
        )
    return logits


def _numbers(module: ModuleType, name: str, what: str) -> tuple[float, float, float] | None:
    value = getattr(module, what, None)
    if value is None:
        return None
    try:
        red, green, blue = (float(one) for one in value)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{short_name(name)}: {what} {value!r}: must be three numbers, one per channel, for "
            "pixels in 0..1"
        ) from error
    numbers = (red, green, blue)
    if not all(map(math.isfinite, numbers)) or (what == "STD" and min(numbers) <= 0):
        above = " above 0" if what == "STD" else ""
        raise ConfigError(f"{short_name(name)}: {what} {value!r}: must be finite numbers{above}")
    return numbers
