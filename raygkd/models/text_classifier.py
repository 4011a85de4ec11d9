"""Classifiers made of image-text models: the texts that name the classes stand for their weights.

Shapes: B batch, C channels, H height, W width, K classes, P prompts, D entries of an embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raygkd.errors import ConfigError, DataError, brief
from raygkd.models.families import ModelFamily
from raygkd.models.mapped import MappedModel
from raygkd.storage.atomic_files import place
from raygkd.storage.reading import MOST_SETTINGS_BYTES, read_text

DEFAULT_PROMPT = "a photo of a {}."


class TextClassifier(MappedModel, ABC):
    """Images (B, 3, H, W) to logits (B, K): the images' similarities to texts of the classes.

    The texts' embeddings are stored with the weights, so that the model needs no text encoder.

    Args:
        net: image encoder.
        num_classes: K.
        size: D.
        levels: number of levels.

    Attributes:
        embedding: gives the images' embeddings (B, D) of length 1.
    """

    texts_KPD: Tensor
    scale: Tensor

    def __init__(self, net: nn.Module, num_classes: int, size: int, levels: int):
        super().__init__(net, levels)
        self.embedding = nn.Identity()
        self.register_buffer("texts_KPD", torch.zeros(num_classes, 1, size))
        self.register_buffer("scale", torch.ones(()))

    @abstractmethod
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Return the images' embeddings (B, D), of any length, and show the levels' maps."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return class scores."""
        embeddings_BD = self.embedding(F.normalize(self.encode(images_BCHW), dim=1))
        return prompted_logits(embeddings_BD, self.texts_KPD, self.scale)

    @property
    def class_proxies(self) -> Tensor:
        """The mean over the prompts of each class's embeddings (K, D)."""
        return self.texts_KPD.mean(1)

    def set_texts(self, texts_KPD: Tensor) -> None:
        """Replace the embeddings of the classes' texts; they are scaled to length 1.

        Args:
            texts_KPD: for each class, in the order of the logits, those of all prompts.
        """
        self.texts_KPD = F.normalize(texts_KPD.to(self.texts_KPD), dim=2)

    def _load_from_state_dict(self, state: Any, prefix: str, *others: Any) -> None:
        # files may have any number of prompts
        saved = state.get(f"{prefix}texts_KPD")
        if saved is not None and saved.ndim == 3 and len(saved) == len(self.texts_KPD):
            self.texts_KPD = self.texts_KPD.new_empty(saved.shape)
        super()._load_from_state_dict(state, prefix, *others)


class ImageTextFamily(ModelFamily):
    """Models that classify images by texts; they need no training, and can only be teachers."""

    only_teaches = True

    @abstractmethod
    def embed_texts(self, name: str, weights: str | None, texts: Sequence[str]) -> Tensor:
        """Return the embeddings (N, D) of texts.

        Args:
            name: of the model.
            weights: file of its weights; None for those that its name means.
            texts: N of them.

        Raises:
            UserError: the weights or the words of its tokeniser cannot be had.
        """


def prompted_logits(embeddings_BD: Tensor, texts_KPD: Tensor, scale: Tensor) -> Tensor:
    """Return the average over prompts of the logits (B, K), weighted by the prompts' confidence.

    The logits of a prompt are its cosines times the scale. Its weight for an image is the largest
    class probability that they give, divided by the sum over the prompts.

    Args:
        embeddings_BD: of images, of length 1.
        texts_KPD: of texts, of length 1.
        scale: of the logits (scalar).

    Source: Xu et al., arXiv 2408.12248, weight the prompts; by which numbers is [ours].
    """
    logits_BKP = scale * torch.einsum("bd,kpd->bkp", embeddings_BD, texts_KPD.to(embeddings_BD))
    confidence_BP = logits_BKP.softmax(1).amax(1)
    weights_BP = confidence_BP / confidence_BP.sum(1, keepdim=True)
    return (logits_BKP * weights_BP[:, None]).sum(2)


def read_prompts(path: str) -> tuple[str, ...]:
    """Return the templates in a file, one per line, each with ``{}`` for the name of a class.

    Raises:
        DataError: it cannot be read, or a line is not a template.
    """
    try:
        text = read_text(place(path), most=MOST_SETTINGS_BYTES)
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}; pass a text file with one prompt per "
            "line"
        ) from error
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise DataError(f"{path}: has no prompt; write one per line, as in '{DEFAULT_PROMPT}'")
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise DataError(
                f"{path}: {brief(prompt)} must have {{}} once, for the name of a class, as in "
                f"'{DEFAULT_PROMPT}'"
            )
    return prompts


def describe_classes(
    model: TextClassifier,
    family: ImageTextFamily,
    name: str,
    weights: str | None,
    class_names: Sequence[str],
    prompts: Sequence[str] = (DEFAULT_PROMPT,),
) -> None:
    """Give a model the texts of its classes.

    Args:
        model: of the family.
        family: whose text encoder is used.
        name: of the model in the family.
        weights: file of its weights; None for those that its name means.
        class_names: in the order of the logits.
        prompts: templates with ``{}`` for a class name.

    Raises:
        ConfigError: there is not one name for each class.
        UserError: the text encoder cannot be had.
    """
    if len(class_names) != len(model.texts_KPD):
        raise ConfigError(
            f"{len(class_names)} class names, but the images have {len(model.texts_KPD)} classes; "
            "pass one for each, in their order"
        )
    texts = [prompt.replace("{}", name) for name in class_names for prompt in prompts]
    with torch.inference_mode():
        texts_ND = family.embed_texts(name, weights, texts)
    model.set_texts(texts_ND.clone().unflatten(0, (len(class_names), len(prompts))))
