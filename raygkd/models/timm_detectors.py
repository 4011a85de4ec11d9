"""torchvision's detectors behind a feature pyramid over a model of timm.

A name is FAMILY_timm:NAME_fpnWIDTH, such as ``retinanet_timm:convnext_atto_fpn64``.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from raygkd.errors import ConfigError, near
from raygkd.models import detectors
from raygkd.models.checkpoints import read_state
from raygkd.models.detectors import DEFAULT_WIDTH, WIDTHS, Detector, detector_on, extra_blocks
from raygkd.models.families import ModelFamily
from raygkd.models.inputs import ModelInput
from raygkd.models.timm_family import HUB, Timm, TimmModel, create, has_maps
from raygkd.models.weights import load_weights
from raygkd.registry import FAMILIES

NAME = re.compile(r"(.+)_fpn([1-9][0-9]*)?")
# of the file, or of timm's weights, of the backbone alone
PRETRAINED = ("imagenet", "pretrained")


class TimmBody(nn.Module):
    """A model of timm without its head: images (B, 3, H, W) to maps of some strides.

    Args:
        net: timm's model.
        levels: the maps of stride 2^level.
        name: of the model, for errors.
        image_size: height and width of its input in pixels.

    Attributes:
        channels: C of each map.
        image_size: see above.

    Raises:
        ConfigError: it has no map of such a stride.
    """

    def __init__(self, net: Any, levels: Sequence[int], name: str, image_size: tuple[int, int]):
        super().__init__()
        info = getattr(net.feature_info, "info", net.feature_info) if has_maps(net) else ()
        places = {one["reduction"]: place for place, one in enumerate(info)}
        strides = [2**level for level in levels]
        if any(stride not in places for stride in strides):
            raise ConfigError(
                f"timm's {name} has maps with strides {', '.join(map(str, places)) or 'none'}, but "
                f"the pyramid needs {', '.join(map(str, strides))}; choose a model with these "
                "strides, such as resnet18 or convnext_atto"
            )
        self._places = [places[stride] for stride in strides]
        self.channels = [info[place]["num_chs"] for place in self._places]
        net.prune_intermediate_layers(self._places, prune_norm=True, prune_head=True)
        self.net, self.image_size = net, image_size

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Return place in the pyramid -> map (B, C, H, W)."""
        maps = self.net.forward_intermediates(
            images_BCHW, indices=self._places, output_fmt="NCHW", intermediates_only=True
        )
        return {str(place): map_BCHW for place, map_BCHW in enumerate(maps)}


class TimmBackbone(BackboneWithFPN):
    """A ``TimmBody`` with its feature pyramid.

    Args:
        body: the backbone.
        levels: of the pyramid.
        width: channels of the pyramid.
    """

    def __init__(self, body: TimmBody, levels: Sequence[int], width: int):
        # the parent's takes the maps of a module's children alone
        nn.Module.__init__(self)
        self.body = body
        self.fpn = torchvision.ops.FeaturePyramidNetwork(
            body.channels, width, extra_blocks(levels, width)
        )
        self.out_channels = width


class TimmDetectors(ModelFamily):
    """The detectors of one of torchvision's families on any of timm's models with stages.

    Attributes:
        kind: the family, of ``raygkd.models.detectors``.
    """

    task = "detection"
    loads_weights = True
    kind: ClassVar[str]

    def names(self) -> Sequence[str]:
        """Return the names of the default width."""
        return tuple(f"{name}_fpn" for name in Timm().names())

    def check_name(self, name: str) -> None:
        """Refuse a name that is not NAME_fpnWIDTH, or an unknown model of timm."""
        match = NAME.fullmatch(name)
        model, width = (match[1], match[2] or "") if match is not None else ("", "")
        known = [f"{one}_fpn{width}" for one in Timm().names()]
        is_known = model.startswith(HUB) or f"{model.partition('.')[0]}_fpn{width}" in known
        if not is_known or int(width or DEFAULT_WIDTH) not in WIDTHS:
            raise ConfigError(
                f"{name!r}{near(name, known)} (a name is NAME_fpnWIDTH: NAME of timm; WIDTH a "
                "multiple of 16 from 16 to 512, 256 by default)"
            )
        Timm().check_name(model)

    def build(self, name: str, num_classes: int, image_size: tuple[int, int]) -> Detector:
        """Return an untrained detector."""
        backbone = partial(self._backbone, name, image_size)
        return detector_on(self.kind, num_classes, image_size[0], backbone)

    def _backbone(self, name: str, image_size: tuple[int, int]) -> TimmBackbone:
        model, width = _parts(name)
        levels = detectors.FAMILIES[self.kind].levels
        # the others come from the pyramid
        net, own = create(model, 0, image_size), [level for level in levels if level <= 5]
        body = TimmBody(net, own, model, image_size)
        return TimmBackbone(body, levels, width)

    def inputs(self, name: str) -> ModelInput:
        """Return what the weights of the backbone were normalised with; detectors take any size."""
        of_backbone = Timm().inputs(_parts(name)[0])
        return ModelInput(mean=of_backbone.mean, std=of_backbone.std)

    def load_weights(self, model: nn.Module, name: str, weights: str) -> None:
        """Load a detector's file, or into the backbone a file of timm's or its pretrained weights.

        Raises:
            UserError: they cannot be had or do not fit.
        """
        if weights not in PRETRAINED and any(".fpn." in key for key in read_state(weights)):
            assert isinstance(model, Detector)
            load_weights(model, weights)
            return
        backbone = _parts(name)[0]
        body: Any = model.get_submodule("net.backbone.body")
        whole = Timm().build(backbone, 2, body.image_size)
        assert isinstance(whole, TimmModel)
        if weights in PRETRAINED:
            Timm().load_pretrained(whole, backbone, 2)
        else:
            Timm().load_file(whole, backbone, 2, weights)
        loaded = whole.net.state_dict()
        body.net.load_state_dict({key: loaded[key] for key in body.net.state_dict()})


def _parts(name: str) -> tuple[str, int]:
    """Return the model of timm and the width of the pyramid in a name."""
    match = NAME.fullmatch(name)
    assert match is not None
    return match[1], int(match[2] or DEFAULT_WIDTH)


@FAMILIES.register("fasterrcnn_timm")
class TimmFasterRCNN(TimmDetectors):
    """Faster R-CNN on timm's models: NAME_fpnWIDTH."""

    kind = "fasterrcnn"


@FAMILIES.register("retinanet_timm")
class TimmRetinaNet(TimmDetectors):
    """RetinaNet on timm's models: NAME_fpnWIDTH."""

    kind = "retinanet"


@FAMILIES.register("fcos_timm")
class TimmFCOS(TimmDetectors):
    """FCOS on timm's models: NAME_fpnWIDTH."""

    kind = "fcos"


@FAMILIES.register("ssdlite_timm")
class TimmSSDlite(TimmDetectors):
    """SSDlite on timm's models: NAME_fpnWIDTH."""

    kind = "ssdlite"
