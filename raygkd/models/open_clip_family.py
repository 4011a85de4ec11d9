"""Image-text models of OpenCLIP as classifiers by texts.

Shapes: B batch, C channels, H height, W width, D entries of an embedding.
"""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raygkd.errors import ConfigError, DataError, ImageSizeError, near
from raygkd.models.checkpoints import file_digest
from raygkd.models.downloads import hub_file, url_file
from raygkd.models.huggingface_family import level_places
from raygkd.models.inputs import ModelInput
from raygkd.models.loaded_weights import LoadedWeights
from raygkd.models.text_classifier import ImageTextFamily, TextClassifier
from raygkd.optional_packages import require
from raygkd.registry import FAMILIES
from raygkd.storage.atomic_files import local_path

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Named:
    """What a name means: NAME, NAME.TAG, NAME:FILE or FOLDER.

    Attributes:
        architecture: as OpenCLIP's ``create_model`` takes it.
        tag: of pretrained weights.
        file: of weights.
        folder: of configuration and weights.
    """

    architecture: str
    tag: str | None = None
    file: str | None = None
    folder: Path | None = None

    @classmethod
    def parse(cls, name: str) -> Named:
        """Return the parts of a name; nothing is checked."""
        folder = local_path(name)
        if folder.is_dir():
            return cls(f"local-dir:{folder}", folder=folder)
        architecture, colon, file = name.partition(":")
        if colon:
            return cls(architecture, file=file)
        architecture, dot, tag = name.partition(".")
        return cls(architecture, tag=tag if dot else None)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What OpenCLIP knows of the pretrained weights."""
        import open_clip

        if self.folder is not None:
            return json.loads((self.folder / CONFIG).read_text()).get("preprocess_cfg", {})
        return open_clip.get_pretrained_cfg(self.architecture, self.tag) if self.tag else {}

    def weights(self) -> Path | None:
        """Return the file of the weights, which may be fetched; None for random ones.

        Raises:
            DataError: it is missing or cannot be fetched.
        """
        if self.folder is not None:
            found = [self.folder / name for name in WEIGHTS if (self.folder / name).exists()]
            return found[0] if found else None
        if self.file is not None:
            return local_path(self.file)
        if self.tag is None:
            return None
        what = f"the weights {self.tag} of OpenCLIP's {self.architecture}"
        repository, _, named = self.settings.get("hf_hub", "").rpartition("/")
        if repository:
            return hub_file(repository, (named,) if named else WEIGHTS, what)
        return url_file(self.settings["url"], what)


class OpenClipModel(TextClassifier):
    """The image encoder of a model of OpenCLIP, with its maps.

    Args:
        net: image encoder.
        num_classes: number of classes.
        size: entries of an embedding.
        image_size: height and width of the input in pixels.
    """

    def __init__(self, net: Any, num_classes: int, size: int, image_size: tuple[int, int]):
        shapes = _map_shapes(net, image_size)
        # the first place is that of the embedded image, which OpenCLIP does not give
        places = [place - 1 for place in level_places([shapes[0], *shapes])] if shapes else []
        super().__init__(net, num_classes, size, len(places))
        self._places = places

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Return the images' embeddings (B, D)."""
        net: Any = self.net
        if not self._places:
            return net(images_BCHW)
        output = net.forward_intermediates(images_BCHW, indices=self._places, output_fmt="NCHW")
        self.show(dict(enumerate(output["image_intermediates"], start=1)))
        return output["image_features"]


@FAMILIES.register("open_clip")
class OpenClip(ImageTextFamily):
    """Image-text models of OpenCLIP: NAME, NAME.TAG, NAME:FILE, or a folder of its own format."""

    only_teaches = True

    def names(self) -> Sequence[str]:
        """Return the architectures."""
        import open_clip

        return tuple(open_clip.list_models())

    def check_name(self, name: str) -> None:
        """Check that OpenCLIP knows the architecture and the tag, and that files exist."""
        require("open_clip", of=f"open_clip:{name}", extra="open-clip")
        import open_clip

        named = Named.parse(name)
        if named.folder is not None:
            if not (named.folder / CONFIG).exists():
                raise ConfigError(f"{name!r}: the folder has no {CONFIG}")
            return
        if named.architecture not in self.names():
            raise ConfigError(f"{named.architecture!r}{near(named.architecture, self.names())}")
        tags = open_clip.list_pretrained_tags_by_model(named.architecture)
        if named.tag is not None and named.tag not in tags:
            raise ConfigError(
                f"{name!r}: no weights {named.tag!r}{near(named.tag, tags)} of "
                f"{named.architecture} (known: {', '.join(tags) or 'none'})"
            )
        if named.file is not None and not local_path(named.file).is_file():
            raise ConfigError(f"{name!r}: there is no file {named.file}")

    def build(self, name: str, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
        """Return an untrained image encoder without texts."""
        net = _create(Named.parse(name), image_size)
        return OpenClipModel(net.visual, num_classes, _embedding_size(name), image_size)

    def levels(self, model: nn.Module) -> dict[int, str]:
        """Return the modules that the maps go through."""
        assert isinstance(model, OpenClipModel)
        return model.level_paths

    def inputs(self, name: str) -> ModelInput:
        """Return the side of the model's images, and what it was trained to normalise with."""
        import open_clip

        named = Named.parse(name)
        settings = named.settings
        side = open_clip.get_model_config(named.architecture)["vision_cfg"]["image_size"]
        height, width = (side, side) if isinstance(side, int) else side
        return ModelInput(
            size=(height, width),
            mean=tuple(settings.get("mean", open_clip.OPENAI_DATASET_MEAN)),
            std=tuple(settings.get("std", open_clip.OPENAI_DATASET_STD)),
            interpolation=settings.get("interpolation", "bicubic"),
        )

    def pretrained(self, name: str) -> str | None:
        """Return the tag, file or folder of the weights."""
        named = Named.parse(name)
        if named.folder is not None:
            return name if named.weights() is not None else None
        return named.tag or named.file

    def load_pretrained(self, model: nn.Module, name: str, num_classes: int) -> LoadedWeights:
        """Load the weights that the name means."""
        path = Named.parse(name).weights()
        assert path is not None
        return self.load_file(model, name, num_classes, str(path))

    def load_file(self, model: nn.Module, name: str, num_classes: int, path: str) -> LoadedWeights:
        """Load a weights file of the whole model."""
        assert isinstance(model, OpenClipModel)
        size = getattr(model, "input_size", None)
        whole = _loaded(Named.parse(name), path, size)
        model.net.load_state_dict(whole.visual.state_dict())
        model.scale.copy_(whole.logit_scale.detach().exp().reshape(()))
        return LoadedWeights(source=f"OpenCLIP {Path(path).name}", sha256=file_digest(path))

    def embed_texts(self, name: str, weights: str | None, texts: Sequence[str]) -> Tensor:
        """Return the embeddings (N, D) of texts."""
        import open_clip

        named = Named.parse(name)
        path = weights or named.weights()
        assert path is not None
        whole = _loaded(named, str(path), None).eval()
        return whole.encode_text(open_clip.get_tokenizer(named.architecture)(list(texts)))


def _create(named: Named, image_size: tuple[int, int] | None) -> Any:
    """Return a whole model with random weights."""
    import open_clip

    with _without_warnings():
        return open_clip.create_model(
            named.architecture,
            load_weights=False,
            pretrained_text=False,
            force_image_size=image_size,
            force_quick_gelu=bool(named.settings.get("quick_gelu")),
        )


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence logging while a model is made: OpenCLIP warns of random weights, loaded later."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


def _loaded(named: Named, path: str, image_size: tuple[int, int] | None) -> Any:
    """Return a whole model with the weights of a file.

    Raises:
        DataError: the file cannot be read or does not fit.
    """
    import open_clip

    whole = _create(named, image_size)
    try:
        open_clip.load_checkpoint(whole, path, weights_only=True)
    except (OSError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} does not fit OpenCLIP's {named.architecture}: {reason}") from error
    return whole


def _embedding_size(name: str) -> int:
    import open_clip

    return open_clip.get_model_config(Named.parse(name).architecture)["embed_dim"]


def _map_shapes(net: Any, image_size: tuple[int, int]) -> list[tuple[int, ...]]:
    """Return the shapes (B, C, H, W) of all maps that an encoder gives; none where it gives none.

    Raises:
        ImageSizeError: it cannot take images of this size.
    """
    if not hasattr(net, "forward_intermediates"):
        return []
    height, width = image_size
    training = net.training
    try:
        with torch.no_grad():
            output = net.eval().forward_intermediates(
                torch.zeros(1, 3, height, width), output_fmt="NCHW"
            )
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ImageSizeError(
            f"{type(net).__name__} cannot take images of {height} x {width} pixels: "
            f"{(str(error).splitlines() or ['they do not fit its layers'])[0]}"
        ) from error
    finally:
        net.train(training)
    return [tuple(map_BCHW.shape) for map_BCHW in output["image_intermediates"]]
