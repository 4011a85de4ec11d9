"""Detectors in shapes that the number of images alone decides, so that their graph can be exported.

torchvision's detectors keep as many boxes as pass a threshold, image by image in Python. Here every
step has a fixed number of places, those without a box have the score -1, and a batch is one tensor.
What is found is the same: the same layers, candidates, suppression and order.

Shapes: B batch, S side of the square input, C channels, L level of the pyramid, A anchors (of all
levels, or of one), P proposals of an image, N candidates of a class, K classes without background,
D most detections of an image, U candidates above the threshold in the whole batch, 4 the sides of a
box (x0, y0, x1, y1) in pixels of the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image, nms, roi_align
from torchvision.ops.poolers import LevelMapper

from raygkd.models.detectors import MOST_DETECTIONS, Detector

NOTHING = -1.0
# the scores of proposals are in 0..1, and all of them count
ANY_SCORE = -0.5
# in pixels; torchvision leaves out smaller boxes of regions
SMALLEST_SIDE = 1e-2

# boxes (B, K, N, 4), scores (B, K, N), IoU, score -> which stay (B, K, N)
Suppression = Callable[[Tensor, Tensor, float, float], Tensor]


def suppress(boxes_BKN4: Tensor, scores_BKN: Tensor, overlap: float, threshold: float) -> Tensor:
    """Return what non-maximum suppression leaves, by image and class, as bool (B, K, N).

    Args:
        boxes_BKN4: of non-negative coordinates.
        scores_BKN: of each.
        overlap: IoU above which the box of the lower score goes.
        threshold: boxes whose scores are not above it go, and suppress none.
    """
    flat_scores, flat_boxes = scores_BKN.flatten(), boxes_BKN4.reshape(-1, 4)
    place_U = torch.nonzero(flat_scores > threshold)[:, 0]
    group_U = place_U // scores_BKN.shape[2]
    # groups lie too far apart to overlap; in float64, where their boxes stay what they are
    apart = flat_boxes.double().amax() + 1
    moved_U4 = flat_boxes[place_U].double() + (group_U * apart)[:, None]
    # a graph takes for granted that two boxes stay: these do, and have a place of their own
    extra_24 = moved_U4.new_tensor([[-4, -4, -3, -3], [-2, -2, -1, -1]])
    extra_2 = place_U.new_full((2,), flat_scores.numel())
    stay = nms(
        torch.cat([extra_24, moved_U4]),
        torch.cat([moved_U4.new_ones(2), flat_scores[place_U].double()]),
        overlap,
    )
    kept = flat_scores.new_zeros(flat_scores.numel() + 1, dtype=torch.bool)
    kept = kept.index_fill(0, torch.cat([extra_2, place_U])[stay], True)
    return kept[:-1].view(scores_BKN.shape)


class FixedShapeDetector(nn.Module):
    """What a detector does with normalised images (B, 3, S, S), as one tensor (B, D, 6).

    Each of the D rows of an image holds the sides of a box, its score in 0..1 and its label, the
    position in the class names; best first, and -1 throughout where there are fewer.

    Args:
        detector: in eval mode; its modules are shared.
        side: S.
        suppression: does what :func:`suppress` does.
    """

    def __init__(self, detector: Detector, side: int, suppression: Suppression = suppress):
        super().__init__()
        self.net = detector.net
        self._side = side
        self._suppress = suppression
        image = torch.zeros(1, 3, side, side)
        with torch.no_grad():
            maps = list(self.net.get_submodule("backbone")(image).values())
            owner: Any = self.net.rpn if isinstance(self.net, FasterRCNN) else self.net
            [anchors_A4] = owner.anchor_generator(ImageList(image, [(side, side)]), maps)
        self._anchors_A4: Tensor
        self.register_buffer("_anchors_A4", anchors_A4, persistent=False)
        positions = [one.shape[2] * one.shape[3] for one in maps]
        per_position = len(anchors_A4) // sum(positions)
        self._anchors_of_level = [per_position * count for count in positions]

    def forward(self, images_BCSS: Tensor) -> Tensor:
        """Return the detections of each image."""
        maps = self.net.get_submodule("backbone")(images_BCSS)
        if isinstance(self.net, FasterRCNN):
            candidates = self._of_regions(self.net, maps)
        elif isinstance(self.net, SSD):
            candidates = self._of_boxes(self.net, list(maps.values()))
        else:
            assert isinstance(self.net, FCOS | RetinaNet)
            candidates = self._of_levels(self.net, list(maps.values()))
        rules = self.net.roi_heads if isinstance(self.net, FasterRCNN) else self.net
        return self._best(*candidates, rules.nms_thresh, rules.score_thresh)

    def _best(
        self, boxes_BKN4: Tensor, scores_BKN: Tensor, overlap: float, threshold: float
    ) -> Tensor:
        """Return the detections that are left of candidates (B, D, 6)."""
        kept_BKN = self._suppress(boxes_BKN4, scores_BKN, overlap, threshold)
        flat_scores = scores_BKN.masked_fill(~kept_BKN, NOTHING).flatten(1)
        most = min(MOST_DETECTIONS, flat_scores.shape[1])
        score_BD, place_BD = flat_scores.topk(most)
        box_BD4 = _rows(boxes_BKN4.flatten(1, 2), place_BD)
        label_BD = place_BD // scores_BKN.shape[2]
        found_BD6 = torch.cat([box_BD4, score_BD[..., None], label_BD[..., None].float()], dim=2)
        found_BD6 = found_BD6.masked_fill((score_BD < 0)[..., None], NOTHING)
        return F.pad(found_BD6, (0, 0, 0, MOST_DETECTIONS - most), value=NOTHING)

    def _decoded(self, coder: Any, codes_BA4: Tensor, anchors_BA4: Tensor) -> Tensor:
        """Return boxes inside the canvas (B, A, 4)."""
        decode = coder.decode if isinstance(coder, BoxLinearCoder) else coder.decode_single
        boxes = decode(codes_BA4.flatten(0, 1), anchors_BA4.flatten(0, 1))
        return clip_boxes_to_image(boxes, (self._side, self._side)).view(codes_BA4.shape)

    def _anchors_like(self, codes_BA4: Tensor) -> Tensor:
        return self._anchors_A4.expand(codes_BA4.shape)

    def _of_levels(self, net: FCOS | RetinaNet, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return boxes (B, K, N, 4) and scores (B, K, N) of the best anchors of each level."""
        heads = net.head(maps)
        scores_BAK = heads["cls_logits"].sigmoid()
        if isinstance(net, FCOS):
            scores_BAK = (scores_BAK * heads["bbox_ctrness"].sigmoid()).sqrt()
        codes_BA4 = heads["bbox_regression"]
        boxes_BA4 = self._decoded(net.box_coder, codes_BA4, self._anchors_like(codes_BA4))
        classes = scores_BAK.shape[2]
        best: list[tuple[Tensor, Tensor, Tensor]] = []
        levels = zip(*(part.split(self._anchors_of_level, 1) for part in (scores_BAK, boxes_BA4)))
        for scores_of_level, boxes_of_level in levels:
            flat_scores = scores_of_level.flatten(1)
            score_BN, place_BN = flat_scores.topk(min(net.topk_candidates, flat_scores.shape[1]))
            best.append((score_BN, place_BN % classes, _rows(boxes_of_level, place_BN // classes)))
        score_BN, label_BN, box_BN4 = (torch.cat(parts, 1) for parts in zip(*best))
        label_K1 = torch.arange(classes, device=label_BN.device)[:, None]
        scores_BKN = torch.where(label_BN[:, None] == label_K1, score_BN[:, None], NOTHING)
        return box_BN4[:, None].expand(-1, classes, -1, -1), scores_BKN

    def _of_boxes(self, net: SSD, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return boxes (B, K, N, 4) and scores (B, K, N) of the best anchors of each class."""
        heads = net.head(maps)
        codes_BA4 = heads["bbox_regression"]
        boxes_BA4 = self._decoded(net.box_coder, codes_BA4, self._anchors_like(codes_BA4))
        scores_BKA = heads["cls_logits"].softmax(2)[:, :, 1:].transpose(1, 2)
        scores_BKN, place_BKN = scores_BKA.topk(min(net.topk_candidates, scores_BKA.shape[2]))
        boxes_B1 = _rows(boxes_BA4, place_BKN.flatten(1))
        return boxes_B1.view(*scores_BKN.shape, 4), scores_BKN

    def _of_regions(self, net: FasterRCNN, maps: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return boxes (B, K, P, 4) and scores (B, K, P) of the proposed regions."""
        proposals_BP4, is_proposal_BP = self._proposals(net.rpn, list(maps.values()))
        heads = net.roi_heads
        pooled = self._pooled(heads.box_roi_pool, maps, proposals_BP4)
        logits, codes = heads.box_predictor(heads.box_head(pooled))
        count, classes = proposals_BP4.shape[1], logits.shape[1]
        boxes = heads.box_coder.decode_single(codes, proposals_BP4.flatten(0, 1))
        boxes_BPK4 = clip_boxes_to_image(
            boxes.view(-1, count, classes, 4), (self._side, self._side)
        )
        boxes_BKP4 = boxes_BPK4[:, :, 1:].transpose(1, 2)
        scores_BKP = logits.softmax(1).view(-1, count, classes)[:, :, 1:].transpose(1, 2)
        usable_BKP = _is_large(boxes_BKP4, SMALLEST_SIDE) & is_proposal_BP[:, None]
        return boxes_BKP4, scores_BKP.masked_fill(~usable_BKP, NOTHING)

    def _proposals(self, rpn: RegionProposalNetwork, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the boxes that may hold an object (B, P, 4), and which of them there are."""
        objectness, codes = concat_box_prediction_layers(*rpn.head(maps))
        logits_BA = objectness.view(maps[0].shape[0], -1)
        codes_BA4 = codes.view(maps[0].shape[0], -1, 4)
        boxes_BA4 = self._decoded(rpn.box_coder, codes_BA4, self._anchors_like(codes_BA4))
        best: list[tuple[Tensor, Tensor]] = []
        levels = zip(*(part.split(self._anchors_of_level, 1) for part in (logits_BA, boxes_BA4)))
        for logits_of_level, boxes_of_level in levels:
            most = min(rpn.pre_nms_top_n(), logits_of_level.shape[1])
            logit_BN, place_BN = logits_of_level.topk(most)
            box_BN4 = _rows(boxes_of_level, place_BN)
            usable_BN = _is_large(box_BN4, rpn.min_size)
            score_BN = logit_BN.sigmoid().masked_fill(~usable_BN, NOTHING)
            kept_B1N = self._suppress(
                box_BN4[:, None], score_BN[:, None], rpn.nms_thresh, ANY_SCORE
            )
            best.append((score_BN.masked_fill(~kept_B1N[:, 0], NOTHING), box_BN4))
        score_BN, box_BN4 = (torch.cat(parts, 1) for parts in zip(*best))
        score_BP, place_BP = score_BN.topk(min(rpn.post_nms_top_n(), score_BN.shape[1]))
        return _rows(box_BN4, place_BP), score_BP >= 0

    def _pooled(
        self, pool: MultiScaleRoIAlign, maps: dict[str, Tensor], proposals_BP4: Tensor
    ) -> Tensor:
        """Return the features of each proposal (B x P, C, height, width), from its level."""
        box_4 = proposals_BP4.flatten(0, 1)
        image_BP = torch.arange(proposals_BP4.shape[0], device=box_4.device)[:, None].expand(
            proposals_BP4.shape[:2]
        )
        regions_5 = torch.cat([image_BP.flatten()[:, None].to(box_4), box_4], 1)
        scales = {name: maps[name].shape[2] / self._side for name in pool.featmap_names}
        strides = [round(math.log2(1 / scale)) for scale in scales.values()]
        mapper = LevelMapper(strides[0], strides[-1], pool.canonical_scale, pool.canonical_level)
        level = mapper([box_4])
        channels = maps[pool.featmap_names[0]].shape[1]
        pooled = box_4.new_zeros(box_4.shape[0], channels, *pool.output_size)
        for number, (name, scale) in enumerate(scales.items()):
            here = torch.nonzero(level == number)[:, 0]
            features = roi_align(
                maps[name], regions_5[here], pool.output_size, scale, pool.sampling_ratio
            )
            pooled = pooled.index_put((here,), features)
        return pooled


def _rows(table_BAX: Tensor, place_BN: Tensor) -> Tensor:
    """Return the rows of each image's table at its places (B, N, 4)."""
    return table_BAX.gather(1, place_BN[..., None].expand(-1, -1, table_BAX.shape[2]))


def _is_large(boxes_4: Tensor, side: float) -> Tensor:
    """Return whether both sides of a box (..., 4) are at least so many pixels (...)."""
    return ((boxes_4[..., 2:] - boxes_4[..., :2]) >= side).all(-1)
