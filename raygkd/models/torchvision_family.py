"""torchvision's classifiers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torchvision
from torch import nn

from raygkd.models.checkpoints import file_digest, load_state, read_state
from raygkd.models.downloads import url_file
from raygkd.models.families import ModelFamily
from raygkd.models.inputs import ModelInput
from raygkd.models.loaded_weights import LoadedWeights
from raygkd.registry import FAMILIES
from raygkd.storage.atomic_files import place

# of GoogLeNet and Inception; they would get no gradient
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
# as DenseNet's files have them, and as its modules are called
OLD_NAMES = (re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\."), r"\1\2.")


@FAMILIES.register("torchvision")
class Torchvision(ModelFamily):
    """Any of torchvision's classification models; without their auxiliary heads."""

    def names(self) -> Sequence[str]:
        """Return torchvision's names."""
        return torchvision.models.list_models(module=torchvision.models)

    def build(self, name: str, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
        """Return an untrained classifier."""
        # init_weights=None makes these two models warn
        options = {"aux_logits": False, "init_weights": True}
        return torchvision.models.get_model(
            name,
            weights=None,
            num_classes=num_classes,
            **(options if name in ("googlenet", "inception_v3") else {}),
        )

    def inputs(self, name: str) -> ModelInput:
        """Return what the default weights were trained with."""
        transform = _weights(name).transforms()
        [side] = transform.crop_size
        mean, std = tuple(transform.mean), tuple(transform.std)
        return ModelInput((side, side), mean, std, transform.interpolation.value)

    def pretrained(self, name: str) -> str:
        """Return the name of the default weights."""
        return str(_weights(name))

    def class_names(self, name: str) -> tuple[str, ...]:
        """Return torchvision's names of the classes."""
        return tuple(_weights(name).meta["categories"])

    def load_pretrained(self, model: nn.Module, name: str, num_classes: int) -> LoadedWeights:
        """Load torchvision's default weights."""
        weights = _weights(name)
        path = url_file(weights.url, f"the pretrained weights of torchvision's {name}")
        return self._loaded(model, num_classes, str(path), str(weights))

    def load_file(self, model: nn.Module, name: str, num_classes: int, path: str) -> LoadedWeights:
        """Load a file of torchvision's, or of the same layers."""
        return self._loaded(model, num_classes, path, place(path).name)

    def _loaded(self, model: nn.Module, num_classes: int, path: str, source: str) -> LoadedWeights:
        found, written = OLD_NAMES
        state = {
            found.sub(written, name): tensor
            for name, tensor in read_state(path).items()
            if not name.startswith(AUXILIARY)
        }
        new_layers = load_state(model, state, num_classes, path)
        return LoadedWeights(source=source, sha256=file_digest(path), new_layers=tuple(new_layers))


def _weights(name: str) -> Any:
    return torchvision.models.get_model_weights(name).DEFAULT
