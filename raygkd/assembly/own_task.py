"""Labels, outputs and metric of a person's own model and data.

Shapes: N images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raygkd.errors import ConfigError, brief, text_of


def logits(outputs: Any) -> Any:
    """Return a model's outputs, or their ``logits`` where they have those."""
    if isinstance(outputs, Mapping):
        return outputs.get("logits", outputs)
    return getattr(outputs, "logits", outputs)


def joined(batches: Sequence[Any]) -> Any:
    """Return the outputs of several batches as those of one, on the CPU.

    Raises:
        ConfigError: they are something else than tensors, or dicts, tuples or lists of tensors.
    """
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat([one.cpu() for one in batches])
    if isinstance(first, Mapping):
        return {name: joined([one[name] for one in batches]) for name in first}
    if isinstance(first, tuple | list):
        return tuple(joined(part) for part in zip(*batches, strict=True))
    raise ConfigError(
        f"metric: the student returns a {type(first).__name__} without logits; let it return a "
        "tensor, or a dict or tuple of tensors"
    )


class _Meter:
    """Counts images."""

    def __init__(self) -> None:
        self._images = 0

    def update(self, output: Any, batch: Mapping[str, Tensor]) -> None:
        self._images += len(batch["image"])

    def compute(self) -> dict[str, float]:
        return {"images": float(self._images)}

    def state_dict(self) -> dict[str, Tensor]:
        return {"images": torch.tensor(self._images)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._images = int(state["images"])


@dataclass(frozen=True)
class OwnTask:
    """The user's labels and metric."""

    lead_score: ClassVar[str] = "score"
    metric: Callable[[Any, Any], Any]
    device: torch.device

    def targets(self, batch: Mapping[str, Tensor], device: torch.device) -> Any:
        """Return the labels of a batch on a device."""
        return batch["label"].to(device)

    def is_blank(self, batch: Mapping[str, Tensor]) -> bool:
        """Return that every batch has labels."""
        return False

    def meter(self, device: torch.device) -> _Meter:
        """Return a meter that counts images."""
        return _Meter()

    @torch.no_grad()
    def score(
        self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], inputs: Any
    ) -> dict[str, Any]:
        """Return the metric of all images as "score"; nothing if there are none."""
        outputs, labels = [], []
        for batch in batches:
            outputs.append(logits(model(batch["image"].to(self.device))))
            labels.append(batch["label"].cpu())
        if not outputs:
            return {}
        value = self.metric(joined(outputs), torch.cat(labels))
        try:
            return {"score": float(value)}
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"metric: must return a number, not {brief(value)}") from error


def check_functions(
    loss: Any, metric: Any, optimizer: Any | None = None, reporter: Any | None = None
) -> None:
    """Raise ConfigError for arguments that are not functions."""
    given = {"loss": loss, "metric": metric, "optimizer": optimizer, "reporter": reporter}
    for name, function in given.items():
        if function is None and name in ("optimizer", "reporter"):
            continue
        # calling the class of a loss would make one of outputs and labels
        is_class = isinstance(function, type) and issubclass(function, nn.Module)
        if is_class or not callable(function):
            raise ConfigError(f"{name}: {brief(function)} must be a function")


def loss_of(loss: Callable[[Any, Any], Tensor], outputs: Any, labels: Any) -> Tensor:
    """Return the loss of a batch.

    Raises:
        ConfigError: ``cross_entropy`` cannot take the outputs or labels, or a loss is not a scalar
            that has a gradient.
    """
    try:
        value = loss(outputs, labels)
    except (IndexError, RuntimeError) as error:
        if loss is not F.cross_entropy:
            raise
        raise ConfigError(
            f"loss: cross_entropy fails on outputs {tuple(outputs.shape)} and labels "
            f"{tuple(labels.shape)} of {labels.dtype}: {text_of(error)}"
        ) from error
    if not isinstance(value, Tensor):
        raise ConfigError(f"loss: must return a scalar tensor, not {brief(value)}")
    if value.ndim or (torch.is_grad_enabled() and not value.requires_grad):
        of = "without a gradient" if not value.ndim else f"of shape {tuple(value.shape)}"
        raise ConfigError(f"loss: must return a scalar with a gradient, not a tensor {of}")
    return value


def chosen_device(device: Any) -> torch.device:
    """Return the device to train on; ConfigError if this machine has no such device."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.zeros(1, device=place).item()
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ConfigError(f"device: {brief(device)} cannot be used ({text_of(error)})") from error
    return place
