"""Image-text models (CLIP) of Hugging Face's transformers as classifiers by texts.

Shapes: B batch, C channels, H height, W width, D entries of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raygkd.errors import ConfigError, DataError
from raygkd.models.families import short_name
from raygkd.models.huggingface_family import (
    WEIGHTS,
    HuggingFace,
    file_of,
    level_places,
    licence_of,
    map_shapes,
    maps_of,
    patch_size,
    read_config,
    silence,
    size_options,
    weights_digest,
)
from raygkd.models.loaded_weights import LoadedWeights
from raygkd.models.text_classifier import ImageTextFamily, TextClassifier
from raygkd.registry import FAMILIES
from raygkd.storage.atomic_files import local_path

TOKENIZER = ("tokenizer.json", "vocab.json")
_IMAGES = ("vision_model.", "visual_projection.")


class HuggingFaceClip(TextClassifier):
    """The image encoder of a CLIP model of transformers, with its maps.

    Args:
        net: image encoder with projection.
        num_classes: number of classes.
        image_size: height and width of the input in pixels.
    """

    def __init__(self, net: Any, num_classes: int, image_size: tuple[int, int]):
        patch, options = patch_size(net), size_options(net, image_size)
        places = level_places(map_shapes(net, image_size, patch, options))
        super().__init__(net, num_classes, net.config.projection_dim, len(places))
        self._places, self._patch, self._options = places, patch, options

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Return the images' embeddings (B, D)."""
        options = {**self._options, "output_hidden_states": True}
        output = self.net(pixel_values=images_BCHW, **options)
        states = maps_of(output, images_BCHW.shape[2:], self._patch)
        self.show({level: states[place] for level, place in enumerate(self._places, start=1)})
        return output.image_embeds


@FAMILIES.register("hf-clip")
class HuggingFaceClips(HuggingFace, ImageTextFamily):
    """CLIP models of transformers as classifiers by texts: ORG/NAME on the Hub, or a folder."""

    only_teaches = True

    def check_name(self, name: str) -> None:
        """Check that a name is a folder with a CLIP model, or has the form of one on the Hub."""
        super().check_name(name)
        if local_path(name).is_dir() and read_config(name).model_type != "clip":
            raise ConfigError(f"{name!r}: is not a CLIP model; name it hf:{name}")

    def by_texts(self, name: str) -> str | None:
        """Return nothing: it is one already."""
        return None

    def build(self, name: str, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
        """Return an untrained image encoder without texts."""
        from transformers import CLIPVisionModelWithProjection

        silence()
        config = read_config(name)
        config.vision_config.projection_dim = config.projection_dim
        net = CLIPVisionModelWithProjection(config.vision_config)
        return HuggingFaceClip(net, num_classes, image_size)

    def class_names(self, name: str) -> tuple[str, ...]:
        """Return nothing: the classes are those of the images."""
        return ()

    def load_pretrained(self, model: nn.Module, name: str, num_classes: int) -> LoadedWeights:
        """Load the weights of the repository or folder."""
        path = file_of(name, WEIGHTS)
        _load(model, path.parent)
        return LoadedWeights(
            source=f"hf {short_name(f'hf:{name}').removeprefix('hf:')}",
            sha256=weights_digest(name, path),
            licence=licence_of(name),
        )

    def load_file(
        self, model: nn.Module, name: str, num_classes: int, path: str
    ) -> LoadedWeights | None:
        """Refuse a file: the encoders of images and texts belong together."""
        raise DataError(
            f"{path}: is a file; pass the folder that save_pretrained wrote as hf-clip:FOLDER"
        )

    def embed_texts(self, name: str, weights: str | None, texts: Sequence[str]) -> Tensor:
        """Return the embeddings (N, D) of texts."""
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        file_of(name, TOKENIZER)
        folder = file_of(name, WEIGHTS).parent
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        config = read_config(name)
        config.text_config.projection_dim = config.projection_dim
        encoder = CLIPTextModelWithProjection.from_pretrained(
            folder, config=config.text_config, local_files_only=True
        )
        length = config.text_config.max_position_embeddings
        tokens = tokenizer(
            list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        kept = {key: tokens[key] for key in ("input_ids", "attention_mask")}
        return encoder.eval()(**kept).text_embeds


def _load(model: nn.Module, folder: Path) -> None:
    """Load image encoder and scale of the model in a folder.

    Raises:
        DataError: weights are missing or of another shape.
    """
    from transformers import CLIPModel

    assert isinstance(model, HuggingFaceClip)
    loaded: Any = CLIPModel.from_pretrained(
        folder, ignore_mismatched_sizes=True, output_loading_info=True, local_files_only=True
    )
    whole, report = loaded
    absent = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if absent:
        raise DataError(
            f"{folder} does not fit CLIPModel: {len(absent)} tensors are missing or of another "
            f"shape ({', '.join(absent[:3])})"
        )
    state = {key: part for key, part in whole.state_dict().items() if key.startswith(_IMAGES)}
    model.net.load_state_dict(state)
    model.scale.copy_(torch.as_tensor(whole.logit_scale.detach().exp()))
