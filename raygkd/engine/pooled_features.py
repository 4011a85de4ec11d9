"""A model's pooled features: its last feature map, averaged over positions; and their neighbours.

Shapes: B batch, C channels, H height, W width, N images of
known class, M nearest of them, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raygkd.engine.distributed import all_sum, gather
from raygkd.models import FeatureTap, stage_modules

# as in DINO (arXiv 2104.14294) and its predecessors
NEIGHBOURS = 20
TEMPERATURE = 0.07


class Pooled(Protocol):
    """A model that also gives pooled features."""

    def __call__(self, images_BCHW: Tensor) -> tuple[Any, Tensor]:
        """Return the model's output, and features (B, C)."""


@contextmanager
def pooled_features(model: nn.Module) -> Iterator[Pooled]:
    """Yield a function of images to a model's output and the mean of its deepest level's map.

    Raises:
        ConfigError: the model has no levels.
    """
    level = max(stage_modules(model))
    # hooks that are new to a compiled model would be overlooked
    with torch.compiler.set_stance("force_eager"), FeatureTap(model, [level]) as tap:

        def pooled(images_BCHW: Tensor) -> tuple[Any, Tensor]:
            output, features = tap(images_BCHW)
            return output, features[level].float().mean((2, 3))

        yield pooled


class NeighbourProbe:
    """Classifies images by those most like them, while they pass through a model.

    The classes of the nearest images have votes, weighted by exp(cosine / T). Source: Wu et al.,
    arXiv 1805.01978, section 3.4.

    Args:
        pooled: the model.
        features_NC: of images of known class, of length 1.
        labels_N: their classes.
        num_classes: K.
    """

    def __init__(self, pooled: Pooled, features_NC: Tensor, labels_N: Tensor, num_classes: int):
        self._pooled, self._num_classes = pooled, num_classes
        self._features_NC, self._labels_N = features_NC, labels_N
        self._right = torch.zeros(2, dtype=torch.float64, device=features_NC.device)

    def __call__(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """Return the model's logits (B, K), and count of how many images the votes are right."""
        logits_BK, features_BC = self._pooled(images_BCHW)
        right = (self.votes(features_BC).argmax(1) == labels_B).sum()
        self._right += torch.stack([right, right.new_tensor(len(labels_B))])
        return logits_BK

    def votes(self, features_BC: Tensor) -> Tensor:
        """Return the votes for each class (B, K)."""
        cosines_BN = F.normalize(features_BC, dim=1) @ self._features_NC.T
        nearest_BM, places_BM = cosines_BN.topk(min(NEIGHBOURS, cosines_BN.shape[1]), dim=1)
        votes_BK = nearest_BM.new_zeros(len(features_BC), self._num_classes)
        weights_BM = (nearest_BM / TEMPERATURE).exp()
        return votes_BK.scatter_add(1, self._labels_N[places_BM], weights_BM)

    def accuracy(self) -> float:
        """Return the share of the images of all ranks of which the votes were right."""
        right, count = all_sum(self._right).tolist()
        return right / count


@contextmanager
def neighbour_probe(
    model: nn.Module,
    known: Iterable[Mapping[str, Tensor]],
    inputs: Callable[[Mapping[str, Tensor]], Tensor],
    num_classes: int,
) -> Iterator[NeighbourProbe]:
    """Yield a probe of a model; every rank must call, each with its share of the known images.

    Args:
        model: in eval mode.
        known: batches with "image" and "label" (B,).
        inputs: of a batch, the model's input (B, 3, H, W) on its device.
        num_classes: K.
    """
    with torch.no_grad(), pooled_features(model) as pooled:
        found = [(pooled(inputs(batch))[1], batch["label"]) for batch in known]
        device = next(model.parameters()).device
        # the share of a rank may be empty
        every = [
            pair
            for of_rank in gather([(features.cpu(), labels) for features, labels in found])
            for pair in of_rank
        ]
        features_NC = torch.cat([features for features, _ in every]).to(device)
        labels_N = torch.cat([labels for _, labels in every]).to(device)
        yield NeighbourProbe(pooled, F.normalize(features_NC, dim=1), labels_N, num_classes)
