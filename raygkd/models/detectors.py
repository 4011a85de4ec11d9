"""The detectors by name: torchvision's families behind feature pyramids of any width.

Faster R-CNN (arXiv 1506.01497), RetinaNet (1708.02002), FCOS (1904.01355) and SSDlite (1801.04381)
on a feature pyramid network (FPN, 1612.03144) over a ResNet (1512.03385) or MobileNetV3
(1905.02244).

Shapes: B batch, C channels, H height, W width, S side of the square input, M boxes of an image,
D detections of an image, 4 the sides of a box (x0, y0, x1, y1) in pixels of the input.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import (
    FCOSClassificationHead,
    FCOSHead,
    FCOSRegressionHead,
)
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from raygkd.errors import ConfigError, near
from raygkd.models.families import is_of_family

DEFAULT_WIDTH = 256
WIDTHS = range(16, 513, 16)

# last layer of each resolution, by level
BACKBONES: dict[str, dict[int, str]] = {
    **{
        f"resnet{depth}": {2: "layer1", 3: "layer2", 4: "layer3", 5: "layer4"}
        for depth in (18, 34, 50, 101)
    },
    "mobilenet_v3_small": {2: "1", 3: "3", 4: "8", 5: "12"},
    "mobilenet_v3_large": {2: "3", 3: "6", 4: "12", 5: "16"},
}

# from this side on, anchors and numbers of proposals are torchvision's
LARGE = 512
SCORE_THRESHOLD = 0.05
NMS_THRESHOLD = 0.5
MOST_DETECTIONS = 100


class Detector(nn.Module):
    """A detector of normalised square images (B, 3, S, S), S a multiple of 32.

    Labels are positions in the class names, from 0; the background class that some families have
    is hidden. Where autocast is on, anchors, boxes and losses stay in float32.

    Args:
        net: torchvision's detector; its own resizing and normalisation are taken out.
        levels: of the maps that its backbone gives, in order; maps beyond them are not levels.
        heads: paths in ``net`` of the modules that predict.
        background: whether its class 0 is the background.

    Attributes:
        net: see above.
        pyramid: level -> path in the Detector of the module whose output is the level's map; level
            k has stride 2^k.
    """

    def __init__(
        self, net: nn.Module, levels: Sequence[int], heads: Sequence[str], background: bool
    ):
        super().__init__()
        self.net = net
        self.net.transform = _ReadyBatch()
        blocks = {level: f"layer_blocks.{place}" for place, level in enumerate(levels)}
        extra = {6: "extra_blocks.p6", 7: "extra_blocks.p7"}
        self.pyramid = {
            level: f"net.backbone.fpn.{extra.get(level, blocks[level])}" for level in levels
        }
        self._first_label = int(background)
        for path in ("backbone", *heads):
            net.get_submodule(path).register_forward_hook(_to_float32)

    @property
    def is_two_stage(self) -> bool:
        """Whether it proposes boxes first, and then classifies them."""
        return isinstance(self.net, FasterRCNN)

    def forward(
        self, images_BCHW: Tensor, targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return the parts of the loss when training, the detections otherwise.

        Args:
            images_BCHW: normalised, (B, 3, S, S).
            targets: of each image "boxes" (M, 4), float32 of positive area, and "labels" (M,),
                int64; M may be 0. Needed for training, not used otherwise.

        Returns:
            When training, name -> part of the loss (scalar), to be summed. Otherwise of each image
            "boxes" (D, 4) inside the canvas, "labels" (D,) and "scores" (D,) in 0..1, best first.

        Raises:
            ValueError: training without targets.
            AssertionError: a box without area.
        """
        if not self.training:
            return [
                {**found, "labels": found["labels"] - self._first_label}
                for found in self.net(images_BCHW)
            ]
        if targets is None:
            raise ValueError("a detector needs targets for training")
        shifted = [
            {"boxes": target["boxes"], "labels": target["labels"] + self._first_label}
            for target in targets
        ]
        parts = self.net(images_BCHW, shifted)
        return {name.removeprefix("loss_"): part for name, part in parts.items()}

    def features(self, images_BCHW: Tensor) -> dict[int, Tensor]:
        """Return level -> map (B, C, H, W) of the pyramid; the heads do not run."""
        maps = self.net.get_submodule("backbone")(images_BCHW)
        return dict(zip(self.pyramid, maps.values()))


class _ReadyBatch(nn.Module):
    """Stands where torchvision resizes, normalises and pads: the batch comes ready."""

    def forward(self, images_BCHW: Tensor, targets: Any) -> tuple[ImageList, Any]:
        sizes = [tuple(images_BCHW.shape[2:])] * len(images_BCHW)
        return ImageList(images_BCHW, sizes), targets

    def postprocess(self, detections: Any, sizes: Any, original_sizes: Any) -> Any:
        return detections


def _to_float32(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook: in bfloat16, pixels beyond 256 are no longer told apart."""
    return _float32(output)


def _float32(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.float()
    if isinstance(output, dict):
        return {name: _float32(part) for name, part in output.items()}
    return type(output)(_float32(part) for part in output)


def _group_norm(channels: int) -> nn.GroupNorm:
    """Return the norm of heads, groups of 8 channels: a level may be one position of one image."""
    return nn.GroupNorm(channels // 8, channels)


def _anchor_scale(image_size: int) -> int:
    """Return the finest anchor's side in strides, of the families with several per position."""
    return 4 if image_size >= LARGE else 2


def _fasterrcnn(backbone: BackboneWithFPN, classes: int, image_size: int) -> nn.Module:
    sides = [2 * _anchor_scale(image_size) * 2**level for level in (2, 3, 4, 5, 6)]
    # 1024, torchvision's, at the default width
    hidden = 4 * backbone.out_channels
    # of torchvision's numbers; a small image has less room for objects
    part = 1 if image_size >= LARGE else 4
    return FasterRCNN(
        backbone,
        rpn_pre_nms_top_n_train=2000 // part,
        rpn_pre_nms_top_n_test=1000 // part,
        rpn_post_nms_top_n_train=2000 // part,
        rpn_post_nms_top_n_test=1000 // part,
        box_batch_size_per_image=512 // part,
        rpn_anchor_generator=AnchorGenerator(
            tuple((side,) for side in sides), ((0.5, 1.0, 2.0),) * len(sides)
        ),
        box_head=TwoMLPHead(backbone.out_channels * 7**2, hidden),
        box_predictor=FastRCNNPredictor(hidden, classes),
        box_score_thresh=SCORE_THRESHOLD,
        box_nms_thresh=NMS_THRESHOLD,
        box_detections_per_img=MOST_DETECTIONS,
    )


def _retinanet(backbone: BackboneWithFPN, classes: int, image_size: int) -> nn.Module:
    sides = [_anchor_scale(image_size) * 2**level for level in (3, 4, 5, 6, 7)]
    thirds = tuple(tuple(int(side * 2 ** (k / 3)) for k in range(3)) for side in sides)
    anchors = AnchorGenerator(thirds, ((0.5, 1.0, 2.0),) * len(sides))
    width = backbone.out_channels
    # without a norm a narrow head's signal fades, and it does not learn from random weights
    norm = None if width == DEFAULT_WIDTH else _group_norm
    return RetinaNet(
        backbone,
        classes,
        anchor_generator=anchors,
        head=RetinaNetHead(width, anchors.num_anchors_per_location()[0], classes, norm),
        score_thresh=SCORE_THRESHOLD,
        nms_thresh=NMS_THRESHOLD,
        detections_per_img=MOST_DETECTIONS,
    )


def _fcos(backbone: BackboneWithFPN, classes: int, image_size: int) -> nn.Module:
    # torchvision's head has 32 groups, so a multiple of 32 channels; its parts can be given others
    head = FCOSHead(32, 1, classes)
    width = backbone.out_channels
    head.classification_head = FCOSClassificationHead(width, 1, classes, norm_layer=_group_norm)
    head.regression_head = FCOSRegressionHead(width, 1, norm_layer=_group_norm)
    return FCOS(
        backbone,
        classes,
        head=head,
        score_thresh=SCORE_THRESHOLD,
        nms_thresh=NMS_THRESHOLD,
        detections_per_img=MOST_DETECTIONS,
    )


def _ssdlite(backbone: BackboneWithFPN, classes: int, image_size: int) -> nn.Module:
    levels = (3, 4, 5, 6, 7)
    sides = [_anchor_scale(image_size) * 2**level for level in (*levels, 8)]
    anchors = DefaultBoxGenerator(
        [[2, 3] for _ in levels], scales=[side / image_size for side in sides]
    )
    widths = [backbone.out_channels] * len(levels)
    return SSD(
        backbone,
        anchors,
        (image_size, image_size),
        classes,
        head=SSDLiteHead(widths, anchors.num_anchors_per_location(), classes, _group_norm),
        score_thresh=SCORE_THRESHOLD,
        nms_thresh=NMS_THRESHOLD,
        detections_per_img=MOST_DETECTIONS,
    )


@dataclass(frozen=True)
class Family:
    """What the detectors of one family share.

    Attributes:
        build: of a backbone, the number of classes with the background, and S, makes the network.
        levels: of the pyramid.
        heads: paths of the modules that predict.
        background: whether class 0 is the background.
    """

    build: Callable[[BackboneWithFPN, int, int], nn.Module]
    levels: tuple[int, ...]
    heads: tuple[str, ...]
    background: bool


FAMILIES = {
    "fasterrcnn": Family(
        _fasterrcnn, (2, 3, 4, 5), ("rpn.head", "roi_heads.box_predictor"), background=True
    ),
    "retinanet": Family(_retinanet, (3, 4, 5, 6, 7), ("head",), background=False),
    "fcos": Family(_fcos, (3, 4, 5, 6, 7), ("head",), background=False),
    "ssdlite": Family(_ssdlite, (3, 4, 5, 6, 7), ("head",), background=True),
}

NAME = re.compile(rf"({'|'.join(FAMILIES)})_({'|'.join(BACKBONES)})_fpn([1-9][0-9]*)?")


def detector_names() -> tuple[str, ...]:
    """Return the names of the detectors of the default width."""
    return tuple(f"{family}_{backbone}_fpn" for family in FAMILIES for backbone in BACKBONES)


def is_detector(name: str) -> bool:
    """Return whether a name is that of a detector: of :func:`build_detector`, or of a family."""
    return _parts(name) is not None or is_of_family(name, "detection")


def check_image_size(image_size: int) -> None:
    """Refuse a side of the input, in pixels, that detectors do not take.

    Raises:
        ConfigError: it is not a multiple of 32.
    """
    if image_size < 32 or image_size % 32:
        raise ConfigError(
            f"--image-size {image_size}: must be a multiple of 32 for a detector; set it to "
            f"{max(32, round(image_size / 32) * 32)}"
        )


def backbone_of(name: str) -> str:
    """Return the name of a detector's backbone, as torchvision has it."""
    parts = NAME.fullmatch(name)
    assert parts is not None
    return parts[2]


def build_detector(name: str, num_classes: int, image_size: int) -> Detector:
    """Return a new detector. Its weights are random and depend on torch's seed alone.

    The pyramid of Faster R-CNN has levels 2 to 5, that of the others 3 to 7. Faster R-CNN's region
    proposals also see a level 6, which is level 5 subsampled and has no weights.

    Anchors follow the size of the image, because the objects do. From 512 pixels on they are
    torchvision's: squares of 8 strides for Faster R-CNN and of 4, 5 and 6.3 strides for RetinaNet,
    each also 1:2 and 2:1. Below 512 they are half as large. SSDlite's are of 4 and 5.7 strides,
    below 512 half of that, also 1:2, 2:1, 1:3 and 3:1. FCOS has points; its levels take objects by
    the distance to the farthest side, 4 to 8 strides at any image size. Below 512 pixels Faster
    R-CNN makes a quarter of torchvision's number of proposals and learns from a quarter.

    Of width 256, Faster R-CNN, RetinaNet and FCOS on ResNet-50 are torchvision's networks, so that
    its weights fit. Of other widths RetinaNet's head has group normalisation, as that of its
    ``retinanet_resnet50_fpn_v2``; SSDlite's always has, where its paper normalises over the batch.

    Args:
        name: FAMILY_BACKBONE_fpnWIDTH as in :func:`detector_names`. WIDTH is the number of channels
            of pyramid and heads, a multiple of 16 from 16 to 512; without it 256.
        num_classes: without a background, at least 1.
        image_size: S, a multiple of 32.

    Raises:
        ConfigError: an unknown name, no classes, or a wrong image size.
    """
    parts = _parts(name)
    if parts is None:
        written = name.rpartition("fpn")[2]
        width = written if written.isdecimal() and int(written) in WIDTHS else ""
        raise ConfigError(
            f"unknown detector {name!r}{near(name, [known + width for known in detector_names()])} "
            f"(a name is FAMILY_BACKBONE_fpnWIDTH: FAMILY {', '.join(FAMILIES)}; BACKBONE "
            f"{', '.join(BACKBONES)}; WIDTH a multiple of 16 from 16 to 512, 256 by default)"
        )
    kind, body, channels = parts
    levels = FAMILIES[kind].levels
    return detector_on(kind, num_classes, image_size, partial(_backbone, body, levels, channels))


def detector_on(
    kind: str, num_classes: int, image_size: int, build_backbone: Callable[[], BackboneWithFPN]
) -> Detector:
    """Return a new detector of one of ``FAMILIES`` on a backbone with its pyramid.

    Raises:
        ConfigError: no classes, or a wrong image size.
    """
    if num_classes < 1:
        raise ConfigError(f"a detector needs at least 1 class, got {num_classes}")
    check_image_size(image_size)
    family = FAMILIES[kind]
    backbone = build_backbone()
    net = family.build(backbone, num_classes + family.background, image_size)
    return Detector(net, family.levels, family.heads, family.background)


def _parts(name: str) -> tuple[str, str, int] | None:
    """Return family, backbone and width of a detector's name."""
    match = NAME.fullmatch(name)
    if match is None:
        return None
    width = int(match[3] or DEFAULT_WIDTH)
    return (match[1], match[2], width) if width in WIDTHS else None


def _backbone(name: str, levels: Sequence[int], width: int) -> BackboneWithFPN:
    builder = getattr(torchvision.models, name)
    layers = {level: layer for level, layer in BACKBONES[name].items() if level in levels}
    if name.startswith("resnet"):
        body = builder(weights=None)
        channels = [body.inplanes // 2 ** (5 - level) for level in layers]
    else:
        # eps as with its ImageNet weights; its usual momentum, 0.01, is for far longer training
        body = builder(weights=None, norm_layer=partial(nn.BatchNorm2d, eps=0.001)).features
        channels = [body.get_submodule(layer).out_channels for layer in layers.values()]
    places = {layer: str(place) for place, layer in enumerate(layers.values())}
    return BackboneWithFPN(body, places, channels, width, extra_blocks(levels, width))


def extra_blocks(levels: Sequence[int], width: int) -> ExtraFPNBlock:
    """Return what makes the levels of a pyramid beyond those of its backbone."""
    return LastLevelP6P7(width, width) if 7 in levels else LastLevelMaxPool()
