"""Labels, outputs and metric of a person's own model and data.

Shapes: N images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from raygkd.errors import ConfigError


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
        return {"score": float(self.metric(joined(outputs), torch.cat(labels)))}
