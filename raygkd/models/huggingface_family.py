"""Image classifiers of Hugging Face's transformers, from the Hub or from a folder.

Shapes: B batch, C channels, H height, W width, N tokens, K classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from raygkd.errors import ConfigError, DataError, ImageSizeError
from raygkd.models.checkpoints import class_layers, file_digest, load_file, read_state
from raygkd.models.class_names import names_by_number
from raygkd.models.downloads import hub_file
from raygkd.models.families import ModelFamily, short_name
from raygkd.models.inputs import ModelInput
from raygkd.models.loaded_weights import LoadedWeights
from raygkd.models.mapped import MappedModel
from raygkd.optional_packages import require
from raygkd.registry import FAMILIES
from raygkd.storage.atomic_files import local_path, place
from raygkd.storage.temporary import temporary_folder

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
INDEX = ".index.json"
# weights in several files have an index of them
WEIGHTS = tuple(
    f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", INDEX)
)
# places of the levels of a model whose maps all have one size, as shares of its depth
DEPTHS = (0.25, 0.5, 0.75, 1.0)
_INTERPOLATE = "interpolate_pos_encoding"
# PIL's numbers of the filters -> what is nearest to them of those that work on a device
FILTERS = {1: "bicubic", 3: "bicubic"}


class HuggingFaceModel(MappedModel):
    """A classifier of transformers with its maps: images (B, 3, H, W) to logits (B, K).

    Args:
        net: the classifier.
        image_size: height and width of the input in pixels.
    """

    def __init__(self, net: nn.Module, image_size: tuple[int, int]):
        patch, options = patch_size(net), size_options(net, image_size)
        places = level_places(map_shapes(net, image_size, patch, options))
        super().__init__(net, len(places))
        self._places, self._patch, self._options = places, patch, options

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return class scores."""
        options = {**self._options, "output_hidden_states": bool(self._places)}
        output = self.net(pixel_values=images_BCHW, **options)
        if self._places:
            states = maps_of(output, images_BCHW.shape[2:], self._patch)
            self.show({level: states[place] for level, place in enumerate(self._places, start=1)})
        return output.logits


class PooledClassifier(nn.Module):
    """A backbone that transformers has no classifier of, with a linear layer on its mean.

    Args:
        backbone: a model of ``AutoModel`` with ``last_hidden_state``.
        num_classes: of the layer, whose weights are random.
    """

    def __init__(self, backbone: Any, num_classes: int):
        super().__init__()
        self.config, self.backbone = backbone.config, backbone
        self.classifier = nn.Linear(backbone.config.hidden_size, num_classes)

    def forward(self, pixel_values: Tensor, **options: Any) -> Any:
        """Return the backbone's output with ``logits`` of the mean over positions or tokens."""
        output = self.backbone(pixel_values=pixel_values, **options)
        last = output.last_hidden_state
        output["logits"] = self.classifier(last.mean((2, 3) if last.ndim == 4 else 1))
        return output


def silence() -> None:
    """Turn off the notes and progress bars of transformers; its errors are raised as ever."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def maps_of(output: Any, image_size: Sequence[int], patch: int | None) -> list[Tensor]:
    """Return the hidden states of a model as maps (B, C, H, W), shallow to deep.

    Tokens that come before those of the patches (class, registers) are left out.

    Args:
        output: of a model of transformers.
        image_size: height and width of the input in pixels.
        patch: side of a patch in pixels; None where the states are maps already.
    """
    reshaped = getattr(output, "reshaped_hidden_states", None)
    states = reshaped if reshaped is not None else output.hidden_states
    maps = []
    for state in states or ():
        if state.ndim == 4:
            maps.append(state)
        elif state.ndim == 3 and patch:
            height, width = (side // patch for side in image_size)
            if state.shape[1] >= height * width:
                tokens = state[:, -height * width :].transpose(1, 2)
                maps.append(tokens.reshape(len(state), -1, height, width))
    return maps


@FAMILIES.register("hf")
class HuggingFace(ModelFamily):
    """Image classifiers of transformers: ORG/NAME on the Hub, or a folder."""

    def names(self) -> Sequence[str]:
        """Return nothing: the names are the Hub's."""
        return ()

    def check_name(self, name: str) -> None:
        """Check that a name is a folder with a model, or has the form of a name on the Hub."""
        require("transformers", of=f"hf:{name}", extra="hf")
        folder = local_path(name)
        if folder.is_dir():
            if not (folder / CONFIG).exists():
                raise ConfigError(
                    f"{name!r}: the folder has no {CONFIG}; pass one written by save_pretrained"
                )
        elif name.count("/") != 1 or name.startswith(("/", ".", "~")):
            raise ConfigError(f"{name!r}: is neither a folder nor of the form ORG/NAME")

    def build(self, name: str, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
        """Return an untrained classifier."""
        from transformers import AutoModelForImageClassification

        silence()
        config = read_config(name)
        config.num_labels = num_classes
        try:
            net = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
        except (ValueError, TypeError):
            net = _pooled(config, name, num_classes)
        return HuggingFaceModel(net, image_size)

    def inputs(self, name: str) -> ModelInput:
        """Return what the model's image processor does."""
        try:
            path = file_of(name, (PROCESSOR,))
        except DataError:
            return ModelInput()
        return input_of_processor(json.loads(path.read_text()))

    def levels(self, model: nn.Module) -> dict[int, str]:
        """Return the modules that the maps go through."""
        assert isinstance(model, MappedModel)
        return model.level_paths

    def pretrained(self, name: str) -> str | None:
        """Return the name of the repository or folder."""
        folder = local_path(name)
        if folder.is_dir() and not any((folder / one).exists() for one in WEIGHTS):
            return None
        return name

    def class_names(self, name: str) -> tuple[str, ...]:
        """Return the labels in the model's configuration."""
        return names_by_number(read_config(name).id2label or {})

    def by_texts(self, name: str) -> str | None:
        """Return the name of a CLIP model with weights as a classifier by texts."""
        self.check_name(name)
        is_clip = getattr(read_config(name), "model_type", "") == "clip"
        return f"hf-clip:{name}" if is_clip and self.pretrained(name) else None

    def load_pretrained(self, model: nn.Module, name: str, num_classes: int) -> LoadedWeights:
        """Load the weights of the repository or folder."""
        assert isinstance(model, HuggingFaceModel)
        path = file_of(name, WEIGHTS)
        digest = weights_digest(name, path)
        return LoadedWeights(
            source=f"hf {short_name(f'hf:{name}').removeprefix('hf:')}",
            sha256=digest,
            licence=licence_of(name),
            new_layers=_load_by_transformers(model.net, path.parent, num_classes),
        )

    def load_file(
        self, model: nn.Module, name: str, num_classes: int, path: str
    ) -> LoadedWeights | None:
        """Load a weights file into the classifier."""
        from safetensors.torch import save_file

        assert isinstance(model, HuggingFaceModel)
        try:
            return load_file(model.net, path, num_classes)
        except DataError as error:
            state = {key: tensor.clone() for key, tensor in read_state(path).items()}
            with temporary_folder("files") as folder:
                # what another version of transformers wrote has other names
                save_file(state, folder / WEIGHTS[0], metadata={"format": "pt"})
                try:
                    new_layers = _load_by_transformers(model.net, folder, num_classes)
                except DataError:
                    raise error from None
        return LoadedWeights(
            source=place(path).name, sha256=file_digest(path), new_layers=new_layers
        )


def _pooled(config: Any, name: str, num_classes: int) -> PooledClassifier:
    """Return a backbone that has no classifier in transformers, with a last layer.

    Raises:
        ConfigError: it is not an image model.
    """
    from transformers import AutoModel

    try:
        backbone = AutoModel.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError):
        backbone = None
    if getattr(backbone, "main_input_name", None) != "pixel_values":
        raise ConfigError(
            f"hf:{name}: transformers has no image model of type "
            f"{getattr(config, 'model_type', 'unknown')!r}"
        )
    return PooledClassifier(backbone, num_classes)


def _load_by_transformers(net: Any, folder: Path, num_classes: int) -> tuple[str, ...]:
    """Load the weights in a folder; return the paths of the layers that keep their weights.

    transformers renames what its older versions wrote, and reads pickles as weights alone.

    Raises:
        DataError: they do not fit.
    """
    part = net.backbone if isinstance(net, PooledClassifier) else net
    loaded, report = type(part).from_pretrained(
        folder,
        config=part.config,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        local_files_only=True,
    )
    heads = class_layers(net, num_classes)
    absent = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    if part is net:
        new_layers = tuple(head for head in heads if any(_is_in(key, [head]) for key in absent))
    else:
        new_layers = ("classifier",)
    left = sorted(key for key in absent if not _is_in(key, new_layers))
    if left:
        raise DataError(
            f"{folder} does not fit {type(net).__name__}: {len(left)} tensors are missing or of "
            f"another shape ({', '.join(left[:3])})"
        )
    state = loaded.state_dict()
    part.load_state_dict(
        {k: t for k, t in state.items() if not _is_in(k, new_layers)}, strict=False
    )
    return new_layers


def _is_in(key: str, layers: Sequence[str]) -> bool:
    return key.startswith(tuple(f"{layer}." for layer in layers))


def input_of_processor(settings: Mapping[str, Any]) -> ModelInput:
    """Return what the settings of an image processor say."""
    size = settings.get("crop_size") if settings.get("do_center_crop") else None
    size = size or settings.get("size") or {}
    if isinstance(size, int):
        size = {"height": size, "width": size}
    edge = size.get("shortest_edge")
    sides = (size.get("height", edge), size.get("width", edge))
    mean, std = settings.get("image_mean"), settings.get("image_std")
    normalised = settings.get("do_normalize", True) and mean and std
    return ModelInput(
        size=sides if None not in sides else None,  # type: ignore[arg-type]
        mean=tuple(mean) if normalised else (0.0, 0.0, 0.0),  # type: ignore[arg-type]
        std=tuple(std) if normalised else (1.0, 1.0, 1.0),  # type: ignore[arg-type]
        interpolation=FILTERS.get(settings.get("resample", 2), "bilinear"),
    )


def level_places(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Return the places of the levels among maps of shapes (B, C, H, W).

    Where the maps have several sizes, they are the last of each. Where all have one, they are at
    the quarters of the depth; the first map is the embedded image.
    """
    sizes = [shape[2:] for shape in shapes]
    if len(set(sizes)) > 1:
        return sorted({size: place for place, size in enumerate(sizes)}.values())
    depth = len(sizes) - 1
    return sorted({max(1, round(depth * share)) for share in DEPTHS}) if depth > 0 else []


def map_shapes(
    net: nn.Module, image_size: tuple[int, int], patch: int | None, options: Mapping[str, Any]
) -> list[tuple[int, ...]]:
    """Return the shapes of a model's maps; nothing is computed."""
    tensors = itertools.chain(net.named_parameters(), net.named_buffers())
    state = {name: tensor.detach().to("meta") for name, tensor in tensors}
    images_BCHW = torch.empty(1, 3, *image_size, device="meta")
    given = {**options, "pixel_values": images_BCHW, "output_hidden_states": True}
    training = net.training
    height, width = image_size
    try:
        with torch.no_grad():
            output = functional_call(net.eval(), state, (), given)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ImageSizeError(
            f"{type(net).__name__} cannot take images of {height} x {width} pixels: "
            f"{(str(error).splitlines() or ['they are too small'])[0]}"
        ) from error
    finally:
        net.train(training)
    return [tuple(one.shape) for one in maps_of(output, image_size, patch)]


def patch_size(net: Any) -> int | None:
    """Return the side of a model's patches in pixels; None where it has none."""
    patch = getattr(_image_config(net), "patch_size", None)
    return patch if isinstance(patch, int) else None


def size_options(net: Any, image_size: tuple[int, int]) -> dict[str, Any]:
    """Return what a model needs to be told for images of a size that is not its own."""
    side = getattr(_image_config(net), "image_size", None)
    sides = tuple(side) if isinstance(side, list | tuple) else (side, side)
    takes = inspect.signature(getattr(net, "backbone", net).forward).parameters
    other = side is not None and sides != tuple(image_size)
    return {_INTERPOLATE: True} if other and _INTERPOLATE in takes else {}


def _image_config(net: Any) -> Any:
    """Return a model's configuration, of an image-text model that of its image encoder."""
    return getattr(net.config, "vision_config", net.config)


def file_of(name: str, names: Sequence[str]) -> Path:
    """Return a file of a model's folder or repository.

    Raises:
        DataError: there is none, or it cannot be fetched.
    """
    folder = local_path(name)
    if not folder.is_dir():
        return hub_file(name, names, f"{names[0]} of hf:{name}", ", or pass the model's folder")
    for one in names:
        if (folder / one).exists():
            return folder / one
    raise DataError(f"hf:{name}: the folder has no {' or '.join(names)}")


def weights_digest(name: str, path: Path) -> str:
    """Return the SHA-256 of weights; of several files, that of their own.

    Args:
        name: of the folder or repository.
        path: of the weights, or of the index of their files, which are fetched.

    Raises:
        DataError: a file is missing, or the index cannot be read.
    """
    if not path.name.endswith(INDEX):
        return file_digest(path)
    try:
        parts = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise DataError(f"hf:{name}: {path.name} is damaged; save the model again") from error
    digests = [file_digest(file_of(name, (part,))) for part in parts]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def read_config(name: str) -> Any:
    """Return the configuration of a model.

    Raises:
        ConfigError: transformers cannot use it.
        DataError: there is none.
    """
    from transformers import AutoConfig

    path = file_of(name, (CONFIG,))
    try:
        return AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"hf:{name}: {CONFIG} cannot be used: {reason}") from error


def licence_of(name: str) -> str:
    """Return the licence that the model's card states, where the card is on this machine."""
    import yaml

    try:
        text = (file_of(name, WEIGHTS).parent / "README.md").read_text()
    except (OSError, UnicodeDecodeError):
        return ""
    _, _, rest = text.partition("---\n")
    with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
        front = yaml.safe_load(rest.partition("\n---")[0])
        return str(front.get("license", "")) if isinstance(front, dict) else ""
    return ""
