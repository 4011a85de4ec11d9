"""Keeps the arithmetic of graphs and losses in full precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function of tensors to run in float32 or float64, outside autocast.

    Floating-point arguments are cast to their common type, at least float32; integers stay as they
    are. Autocast is off for the device of the first tensor, so that products are not cast down.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        dtype = functools.reduce(
            torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32
        )

        def cast(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.to(dtype)
            return value

        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(
                *(cast(value) for value in args),
                **{name: cast(value) for name, value in kwargs.items()},
            )

    return run
