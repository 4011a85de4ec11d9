"""timm's classifiers, and those that the Hugging Face Hub has for it.

Shapes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from raygkd.errors import ConfigError, DataError, ImageSizeError, near
from raygkd.models.checkpoints import best_names, file_digest, load_state, read_state
from raygkd.models.downloads import hub_file, url_file
from raygkd.models.families import ModelFamily
from raygkd.models.inputs import ModelInput
from raygkd.models.loaded_weights import LoadedWeights
from raygkd.models.mapped import MappedModel, as_map
from raygkd.registry import FAMILIES
from raygkd.storage.atomic_files import place

HUB = "hf-hub:"
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
# places of the levels of a model whose maps all have one size, as shares of its depth
DEPTHS = (0.25, 0.5, 0.75, 1.0)


class TimmModel(MappedModel):
    """A model of timm with its maps: images (B, 3, H, W) to logits (B, K).

    Args:
        net: timm's model.
        image_size: height and width of its input in pixels.
    """

    def __init__(self, net: nn.Module, image_size: tuple[int, int]):
        indices = level_indices(net) if has_maps(net) else []
        super().__init__(net, len(indices))
        self.image_size = image_size
        self._indices = indices
        self._prefix = int(getattr(net, "num_prefix_tokens", 0) or 0)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return class scores."""
        net: Any = self.net
        if not self._indices:
            return net(images_BCHW)
        final, maps = net.forward_intermediates(
            images_BCHW, indices=self._indices, output_fmt="NCHW"
        )
        if isinstance(final, Tensor):
            # of a transformer, the last map after its norm
            normed = as_map(final, maps[-1], self._prefix)
            maps = [*maps[:-1], maps[-1] if normed is None else normed]
        self.show(dict(enumerate(maps, start=1)))
        return net.forward_head(final)


@FAMILIES.register("timm")
class Timm(ModelFamily):
    """Any of timm's models, NAME or NAME.TAG, or hf-hub:ORG/NAME."""

    def names(self) -> Sequence[str]:
        """Return timm's architectures."""
        import timm

        return timm.list_models()

    def check_name(self, name: str) -> None:
        """Refuse an unknown architecture or tag; a name on the Hub is only looked at."""
        if name.startswith(HUB):
            _check_repository(name.removeprefix(HUB))
            return
        architecture, _, tag = name.partition(".")
        known = self.names()
        if architecture not in known:
            raise ConfigError(f"{name!r}{near(architecture, known)}")
        tags = _tags(architecture)
        if tag and tag not in tags:
            allowed = ", ".join(tags) or "none"
            raise ConfigError(
                f"{name!r}{near(name, [f'{architecture}.{one}' for one in tags])} (tags of "
                f"{architecture}: {allowed})"
            )

    def build(self, name: str, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
        """Return an untrained classifier for images of a size."""
        return TimmModel(create(name, num_classes, image_size), image_size)

    def inputs(self, name: str) -> ModelInput:
        """Return what the weights of this name were trained with."""
        import timm

        cfg = timm.data.resolve_data_config(pretrained_cfg=_cfg(name))
        _, height, width = cfg["input_size"]
        mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
        # the filters that work on a device
        interpolation = "bilinear" if cfg["interpolation"] == "bilinear" else "bicubic"
        return ModelInput((height, width), mean, std, interpolation)

    def levels(self, model: nn.Module) -> dict[int, str]:
        """Return the modules that the maps go through."""
        assert isinstance(model, MappedModel)
        return model.level_paths

    def pretrained(self, name: str) -> str | None:
        """Return the architecture with its tag."""
        if name.startswith(HUB):
            return name
        import timm

        cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
        if cfg is None or not cfg.has_weights:
            return None
        architecture = name.partition(".")[0]
        return f"{architecture}.{cfg.tag}" if cfg.tag else architecture

    def class_names(self, name: str) -> tuple[str, ...]:
        """Return the names in the weights' configuration, or ImageNet's: synset and description."""
        import timm

        cfg = _cfg(name)
        labels, descriptions = cfg.get("label_names"), cfg.get("label_descriptions") or {}
        subset = timm.data.infer_imagenet_subset(cfg)
        if not labels and subset and not name.startswith(HUB):
            info = timm.data.ImageNetInfo(subset)
            labels, descriptions = info.label_names(), info.label_descriptions(as_dict=True)
        return tuple(
            f"{label}, {descriptions[label]}" if label in descriptions else str(label)
            for label in labels or ()
        )

    def load_pretrained(self, model: nn.Module, name: str, num_classes: int) -> LoadedWeights:
        """Load the weights of a tag, resized to the model's input."""
        assert isinstance(model, TimmModel)
        cfg = _cfg(name)
        path = _pretrained_file(cfg, self.pretrained(name) or name)
        if name.startswith(HUB):
            new_layers = _load_file(model, name, num_classes, str(path))
        else:
            # arrays of Google's storage, which a model reads itself
            state = None if path.suffix == ".npz" else read_state(path)
            new_layers = _load_by_timm(model, name, path, state, cfg["num_classes"])
        return LoadedWeights(
            source=f"timm {self.pretrained(name)}",
            sha256=file_digest(path),
            licence=str(cfg.get("license") or ""),
            new_layers=new_layers,
        )

    def load_file(
        self, model: nn.Module, name: str, num_classes: int, path: str
    ) -> LoadedWeights | None:
        """Load a file in timm's format, resized to the model's input."""
        assert isinstance(model, TimmModel)
        new_layers = _load_file(model, name, num_classes, path)
        return LoadedWeights(
            source=place(path).name, sha256=file_digest(path), new_layers=new_layers
        )


def has_maps(net: Any) -> bool:
    """Return whether a model of timm gives its maps."""
    return hasattr(net, "forward_intermediates") and bool(getattr(net, "feature_info", None))


def level_indices(net: Any) -> list[int]:
    """Return the places of a model's levels among its intermediate maps.

    Where the maps have several strides, they are the last of each stride, without a stem of a
    single strided convolution. Where all have one, they are at the quarters of the depth.
    """
    info = getattr(net.feature_info, "info", net.feature_info)
    strides = [one["reduction"] for one in info]
    if len(set(strides)) == 1:
        return sorted({max(1, round(len(info) * share)) - 1 for share in DEPTHS})
    last = {stride: place for place, stride in enumerate(strides)}
    indices = sorted(last.values())
    first = info[indices[0]]
    if len(indices) > 1 and first["reduction"] > 1 and _is_stem(net, first["module"]):
        indices = indices[1:]
    return indices


def _is_stem(net: nn.Module, path: str) -> bool:
    """Return whether the module that timm names for a map is at most one convolution."""
    known = dict(net.named_modules())
    if path and path not in known:
        # a few of timm's models name none of theirs, and have no map of their stem
        return False
    parts = known[path].modules() if path else ()
    return sum(isinstance(part, nn.Conv2d | nn.Linear) for part in parts) < 2


def create(name: str, num_classes: int, image_size: tuple[int, int], **options: Any) -> nn.Module:
    """Return a model of timm for images of a size in pixels.

    Args:
        name: NAME, NAME.TAG or hf-hub:ORG/NAME.
        num_classes: of its last layer; 0 for none.
        image_size: height and width of its input in pixels.
        options: others of ``timm.create_model``.

    Raises:
        ImageSizeError: it does not take images of this size.
    """
    import timm

    logging.getLogger("timm").setLevel(logging.ERROR)
    cfg = _cfg(name)
    if name.startswith(HUB):
        # the folder of the cache, which needs no network
        name = f"local-dir:{_hub_config(name.removeprefix(HUB)).parent}"
    if cfg.get("fixed_input_size") and tuple(cfg["input_size"][1:]) != tuple(image_size):
        options["img_size"] = tuple(image_size)
    height, width = image_size
    try:
        return timm.create_model(name, num_classes=num_classes, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        side = cfg["input_size"][1]
        raise ImageSizeError(
            f"timm's {name} takes images of {side} x {side} pixels only, not {height} x {width}"
        ) from error
    except (AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else "they do not fit its layers"
        raise ImageSizeError(
            f"timm's {name} cannot take images of {height} x {width} pixels: {reason}"
        ) from error


def _load_file(model: TimmModel, name: str, num_classes: int, path: str) -> tuple[str, ...]:
    """Load a file; return the paths of the layers that keep their weights.

    What does not fit as it is may fit after the architecture's own filter of checkpoints, which
    renames old layers and resizes position embeddings. Nothing may be left over after it.

    Raises:
        DataError: it does not fit.
    """
    own = model.net.state_dict()
    state = best_names(read_state(path), own)
    try:
        return tuple(load_state(model.net, state, num_classes, path))
    except DataError as error:
        layers = _class_layers(model, name)
        is_like_ours = 2 * len(own.keys() & state.keys()) > len(own)
        counts = [len(state[key]) for key in (f"{one}.weight" for one in layers) if key in state]
        is_other = counts[0] != num_classes if counts else is_like_ours
        new_layers = layers if is_other else ()
        # the model's own stand in for those of other classes
        state |= {key: own[key] for key in own if key.startswith(_below(new_layers))}
        try:
            _load_by_timm(model, name, Path(path), state, num_classes)
        except DataError:
            raise error from None
        return new_layers


def _load_by_timm(
    model: TimmModel,
    name: str,
    path: Path,
    state: Mapping[str, Tensor] | None,
    classes: int,
) -> tuple[str, ...]:
    """Load weights the way timm does; return the paths of the layers that keep their weights.

    Args:
        model: to load them into.
        name: of the model.
        path: of the weights.
        state: what is in the file; None to let timm's model read it.
        classes: of the file. Of a file of other classes, timm does not check what is missing.

    Raises:
        DataError: they do not fit.
    """
    net: Any = model.net
    num_classes = net.num_classes
    source: dict[str, Any] = {"state_dict": dict(state)} if state else {"file": str(path)}
    overlay = {"source": "", "num_classes": classes, **source}
    if state is not None:
        overlay["custom_load"] = False
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    try:
        other = create(name, num_classes, model.image_size, **options)
    except (RuntimeError, KeyError) as error:
        raise DataError(
            f"{path} does not fit timm's {name}: {' '.join(str(error).split())[:200]}"
        ) from error
    new_layers = _class_layers(model, name) if classes != num_classes else ()
    below = _below(new_layers)
    loaded = {key: part for key, part in other.state_dict().items() if not key.startswith(below)}
    model.net.load_state_dict(loaded, strict=False)
    return new_layers


def _below(layers: Sequence[str]) -> tuple[str, ...]:
    """Return what the names of the weights of layers begin with."""
    return tuple(f"{layer}." for layer in layers)


def _class_layers(model: TimmModel, name: str) -> tuple[str, ...]:
    """Return the paths of the layers whose size is the number of classes."""
    found = _cfg(name).get("classifier") or ()
    paths = (found,) if isinstance(found, str) else tuple(found)
    known = dict(model.net.named_modules())
    return tuple(path for path in paths if path in known)


def _pretrained_file(cfg: Mapping[str, Any], name: str) -> Path:
    what = f"the pretrained weights of timm's {name}"
    if name.startswith(HUB):
        return hub_file(name.removeprefix(HUB), HUB_FILES, what)
    if cfg.get("hf_hub_id"):
        named = cfg.get("hf_hub_filename")
        return hub_file(cfg["hf_hub_id"], (named,) if named else HUB_FILES, what)
    return url_file(cfg["url"], what)


@functools.cache
def _cfg(name: str) -> dict[str, Any]:
    """Return what timm says of the weights of a name."""
    import timm
    from timm.models._hub import load_model_config_from_path

    if name.startswith(HUB):
        folder = _hub_config(name.removeprefix(HUB)).parent
        return dict(load_model_config_from_path(str(folder))[0])
    cfg = timm.get_pretrained_cfg(name)
    return cfg.to_dict() if cfg is not None else {}


def _hub_config(repository: str) -> Path:
    return hub_file(repository, ("config.json",), f"config.json of timm:{HUB}{repository}", "")


def _check_repository(repository: str) -> None:
    owner, slash, name = repository.partition("/")
    if not (owner and slash and name) or "/" in name:
        raise ConfigError(f"'{HUB}{repository}': must be {HUB}ORG/NAME")


@functools.cache
def _tags(architecture: str) -> tuple[str, ...]:
    """Return the tags of an architecture's pretrained weights."""
    import timm

    names = timm.list_models(f"{architecture}.*", pretrained=True)
    return tuple(name.partition(".")[2] for name in names)
