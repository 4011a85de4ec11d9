from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from raygkd.assembly.models import untrained_file
from raygkd.data.spec import ImageSpec
from raygkd.errors import ConfigError, DataError
from raygkd.models import (
    Detector,
    FeatureTap,
    ModelFile,
    build_detector,
    build_from_file,
    build_model,
    check_levels,
    count_parameters,
    detector_names,
    feature_shapes,
    inherit,
    inheritable,
    is_detector,
    load_model_file,
    load_weights,
    save_model_file,
    stage_modules,
)

FAMILIES = ("fasterrcnn", "retinanet", "fcos", "ssdlite")
BOXES = torch.tensor([[8.0, 8.0, 40.0, 40.0], [30.0, 20.0, 62.0, 60.0], [4.0, 36.0, 28.0, 60.0]])
LABELS = torch.tensor([0, 2, 1])


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def smallest(family: str, *, width: int = 16, classes: int = 3, image_size: int = 64) -> Detector:
    torch.manual_seed(0)
    return build_detector(f"{family}_mobilenet_v3_small_fpn{width}", classes, image_size)


def net_of(detector: Detector) -> Any:
    """Return torchvision's network, whose parts have no types."""
    return detector.net


def images(count: int, size: int = 64) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def targets(counts: Sequence[int], scale: float = 1.0) -> list[dict[str, Tensor]]:
    """Return targets of images with the given numbers of boxes."""
    return [{"boxes": BOXES[:count] * scale, "labels": LABELS[:count]} for count in counts]


def shapes_of(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


# names


def test_names_are_all_families_on_all_backbones() -> None:
    names = detector_names()
    assert len(names) == len(set(names)) == 4 * 6
    assert names[0] == "fasterrcnn_resnet18_fpn"
    for name in (*names, *(f"{name}64" for name in names)):
        assert is_detector(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("retinanet_resnet19_fpn64", "did you mean 'retinanet_resnet18_fpn64'"),
        ("fasterrcnn_mobilenetv3_small_fpn", "'fasterrcnn_mobilenet_v3_small_fpn'"),
        ("retinanet_resnet18", "did you mean 'retinanet_resnet18_fpn'"),
        ("fcos_resnet18_fpn20", "WIDTH a multiple of 16 from 16 to 512"),
        ("fcos_resnet18_fpn528", "WIDTH a multiple of 16 from 16 to 512"),
        ("fcos_resnet18_fpn064", "WIDTH a multiple of 16 from 16 to 512"),
        ("resnet18", "FAMILY fasterrcnn, retinanet, fcos, ssdlite"),
    ],
)
def test_unknown_name_is_refused_with_what_is_allowed(name: str, hint: str) -> None:
    assert not is_detector(name)
    with pytest.raises(ConfigError, match="unknown detector") as caught:
        build_detector(name, 3, 64)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("classes", "image_size", "message"),
    [(0, 64, "at least 1 class, got 0"), (3, 100, "-size 100: .*; set it to 96"), (3, 0, "to 32")],
)
def test_wrong_sizes_are_refused(classes: int, image_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_detector("fcos_resnet18_fpn16", classes, image_size)


def test_name_tells_whether_a_model_is_a_detector_or_a_classifier() -> None:
    assert isinstance(build_model("fcos_mobilenet_v3_small_fpn16", 3, (64, 64)), Detector)
    assert not isinstance(build_model("resnet8", 3, (32, 32)), Detector)
    for name in ("fcos_resnet8_fpn", "fasterrcn_resnet18", "torchvision:fasterrcnn_resnet50_fpn"):
        with pytest.raises(ConfigError, match=f"unknown detector '{name}'; did you mean '[frs]"):
            build_model(name, 3, (64, 64))
    with pytest.raises(ConfigError, match="takes square images, got 64 x 96 pixels"):
        build_model("fcos_resnet18_fpn", 3, (64, 96))


# the networks are torchvision's


@pytest.mark.parametrize("name", [name for name in detector_names() if "resnet50" in name][:3])
def test_network_and_losses_of_the_default_width_are_torchvisions(name: str) -> None:
    background = name.startswith("fasterrcnn")
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(
        name, weights=None, weights_backbone=None, num_classes=91,
        min_size=128, max_size=128, image_mean=[0, 0, 0], image_std=[1, 1, 1], _skip_resize=True,
    )  # fmt: skip
    with torch.device("meta"):
        ours = build_detector(name, 91 - background, 512)
    assert count_parameters(ours) == count_parameters(theirs)
    state = theirs.state_dict()
    assert shapes_of(ours.net.state_dict()) == shapes_of(state)
    ours.net.load_state_dict(state, assign=True)
    wanted = targets([3, 0], scale=2)
    shifted = [target | {"labels": target["labels"] + background} for target in wanted]
    torch.manual_seed(1)
    expected = theirs(list(images(2, 128)), shifted)
    torch.manual_seed(1)
    losses = ours(images(2, 128), wanted)
    assert sorted(losses) == sorted(part.removeprefix("loss_") for part in expected)
    for part, loss in expected.items():
        torch.testing.assert_close(losses[part.removeprefix("loss_")], loss)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v3_small", "mobilenet_v3_large"])
def test_pyramid_begins_with_the_last_layer_of_each_resolution(backbone: str) -> None:
    with torch.device("meta"):
        detector = build_detector(f"fasterrcnn_{backbone}_fpn16", 3, 64)
        model = torchvision.models.get_model(backbone)
        last, features_BCHW = {}, torch.empty(1, 3, 64, 64)
        for path, layer in getattr(model, "features", model).named_children():
            if path not in ("avgpool", "fc"):
                features_BCHW = layer(features_BCHW)
                last[features_BCHW.shape[2]] = path
    layers = net_of(detector).backbone.body.return_layers
    assert list(layers) == [last[side] for side in (16, 8, 4, 2)]


@pytest.mark.parametrize(
    ("family", "small", "large"),
    [
        ("fasterrcnn", [16, 32, 64, 128, 256], [32, 64, 128, 256, 512]),
        ("retinanet", [16, 32, 64, 128, 256], [32, 64, 128, 256, 512]),
        ("fcos", [8, 16, 32, 64, 128], [8, 16, 32, 64, 128]),
    ],
)
def test_anchors_follow_the_size_of_the_image(
    family: str, small: list[int], large: list[int]
) -> None:
    for image_size, sides in ((480, small), (512, large)):
        net = net_of(smallest(family, image_size=image_size))
        generator = net.rpn.anchor_generator if family == "fasterrcnn" else net.anchor_generator
        assert [sizes[0] for sizes in generator.sizes] == sides


@pytest.mark.parametrize(("image_size", "side"), [(256, 16.0), (512, 32.0)])
def test_boxes_of_ssdlite_are_as_large_as_those_of_retinanet(image_size: int, side: float) -> None:
    generator = net_of(smallest("ssdlite", image_size=image_size)).anchor_generator
    sides = [scale * image_size for scale in generator.scales]
    assert sides == [side * 2**level for level in range(6)]


# levels and taps


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_of_a_training_pass_are_those_of_the_backbone_alone(family: str) -> None:
    detector = smallest(family).train()
    levels = [2, 3, 4, 5] if family == "fasterrcnn" else [3, 4, 5, 6, 7]
    assert list(stage_modules(detector)) == levels
    losses, maps = FeatureTap(detector, levels)(images(2), targets([1, 3]))
    assert all(loss.shape == () for loss in losses.values())
    alone = detector.features(images(2))
    assert list(alone) == levels
    for level in levels:
        assert torch.equal(maps[level], alone[level])
    shapes = {level: tuple(features.shape[1:]) for level, features in maps.items()}
    assert shapes == {level: (16, *[max(1, 64 // 2**level)] * 2) for level in levels}
    assert feature_shapes(detector, levels, (64, 64)) == shapes


def test_unknown_level_of_a_detector_is_refused_with_the_allowed_ones() -> None:
    with pytest.raises(ConfigError, match=r"student x has no level 2 \(allowed: 3, 4, 5, 6, 7\)"):
        check_levels([3, 2], smallest("fcos"), "student x")


def test_asking_for_shapes_leaves_the_detector_as_it_was() -> None:
    detector = smallest("fcos").train()
    hooks = [len(module._forward_hooks) for module in detector.modules()]
    state = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    assert feature_shapes(detector, [], (64, 64)) == {}
    feature_shapes(detector, [3], (64, 64))
    assert [len(module._forward_hooks) for module in detector.modules()] == hooks
    assert all(module.training for module in detector.modules())
    assert all(torch.equal(tensor, state[n]) for n, tensor in detector.state_dict().items())


# training


@pytest.mark.parametrize("counts", [[0], [1], [0, 0], [0, 3]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_gets_a_finite_gradient_whatever_the_number_of_boxes(
    family: str, counts: list[int]
) -> None:
    # level 7 is a single position: statistics of it would fail at batch size 1
    detector = smallest(family).train()
    losses = detector(images(len(counts)), targets(counts))
    assert all(loss.isfinite() for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    for path, parameter in detector.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path


@pytest.mark.parametrize("width", [16, 48])
@pytest.mark.parametrize("family", FAMILIES)
def test_pyramid_and_heads_have_the_width_of_the_name(family: str, width: int) -> None:
    detector = smallest(family, width=width)
    levels = list(detector.pyramid)
    assert {shape[0] for shape in feature_shapes(detector, levels, (64, 64)).values()} == {width}
    heads = [
        module
        for path, module in detector.named_modules()
        if isinstance(module, nn.Conv2d) and "backbone" not in path
    ]
    assert {module.in_channels for module in heads} <= {width, 1}
    assert detector.train()(images(1), targets([1]))


def train(detector: Detector, steps: int, wanted: list[dict[str, Tensor]]) -> list[float]:
    """Train on one batch; return the loss of each step."""
    detector.train()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        loss = torch.stack(list(detector(images(len(wanted)), wanted).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_falls_in_a_few_steps(family: str) -> None:
    losses = train(smallest(family), 15, targets([1, 3]))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


@pytest.mark.parametrize("family", ["fasterrcnn", "retinanet"])
def test_objects_of_a_known_image_are_found_with_their_classes(family: str) -> None:
    detector = smallest(family)
    wanted = targets([3])
    train(detector, 160, wanted)
    with torch.no_grad():
        (found,) = detector.eval()(images(1))
    overlap = torchvision.ops.box_iou(BOXES, found["boxes"][:3])
    assert overlap.max(1).values.min() > 0.5
    assert torch.equal(found["labels"][overlap.argmax(1)], LABELS)


def test_training_without_targets_is_refused() -> None:
    with pytest.raises(ValueError, match="needs targets"):
        smallest("fcos").train()(images(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_anchors_boxes_and_losses_stay_in_float32_under_autocast(family: str) -> None:
    detector = smallest(family, image_size=320)
    generator = net_of(detector).rpn if family == "fasterrcnn" else net_of(detector)
    anchors: list[Tensor] = []
    generator.anchor_generator.register_forward_hook(lambda *call: anchors.append(call[-1][0]))
    parts = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            parts.append(detector.train()(images(1, 320), targets([3], scale=5)))
            (found,) = detector.eval()(images(1, 320))
        assert found["boxes"].dtype == torch.float32
    assert torch.equal(anchors[0], anchors[2])
    for name, part in parts[1].items():
        assert part.dtype == torch.float32
        torch.testing.assert_close(part, parts[0][name], rtol=0.05, atol=0.01)


# detection


def favour(detector: Detector, label: int) -> None:
    """Make a detector sure that every box is of one class."""
    net, background = net_of(detector), 1
    if hasattr(net, "roi_heads"):
        last = [net.roi_heads.box_predictor.cls_score]
    elif hasattr(net.head.classification_head, "module_list"):
        last = [block[1] for block in net.head.classification_head.module_list]
    else:
        last, background = [net.head.classification_head.cls_logits], 0
    for layer in last:
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, -12.0)
        with torch.no_grad():
            layer.bias.view(-1, 3 + background)[:, label + background] = 3.0


@pytest.mark.parametrize("label", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_count_from_0_in_detections_and_in_targets(family: str, label: int) -> None:
    detector = smallest(family)
    favour(detector, label)
    with torch.no_grad():
        found = detector.eval()(images(2))
        detector.train()
        losses = []
        for wanted in (0, 1, 2):
            torch.manual_seed(0)
            parts = detector(images(1), [{"boxes": BOXES[:1], "labels": torch.tensor([wanted])}])
            losses.append(float(torch.stack(list(parts.values())).sum()))
    assert losses.index(min(losses)) == label
    for one in found:
        assert set(one["labels"].tolist()) == {label}


@pytest.mark.parametrize("family", FAMILIES)
def test_detections_are_inside_the_canvas_and_best_first(family: str) -> None:
    detector = smallest(family).eval()
    favour(detector, 1)
    with torch.no_grad():
        found = detector(images(2))
    assert len(found) == 2
    for one in found:
        assert 0 < len(one["boxes"]) <= 100
        assert one["boxes"].shape == (len(one["scores"]), 4)
        assert one["labels"].dtype == torch.int64
        assert one["boxes"].min() >= 0
        assert one["boxes"].max() <= 64
        assert (one["boxes"][:, 2:] >= one["boxes"][:, :2]).all()
        assert (one["scores"] >= 0.05).all()
        assert torch.equal(one["scores"], one["scores"].sort(descending=True).values)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_file_gives_back_a_detector_that_finds_the_same(family: str, tmp_path: Path) -> None:
    detector = smallest(family)
    train(detector, 2, targets([1, 3]))
    save_model_file(
        tmp_path / "student.pt",
        ModelFile(
            name=f"{family}_mobilenet_v3_small_fpn16",
            class_names=("cat", "dog", "eel"),
            image_size=(64, 64),
            mean=(0.5, 0.5, 0.5),
            std=(0.2, 0.2, 0.2),
            state_dict=detector.state_dict(),
            scores={"val_score": 0.5},
            config="seed: 0\n",
        ),
    )
    rebuilt = build_from_file(load_model_file(tmp_path / "student.pt"))
    assert not rebuilt.training
    with torch.no_grad():
        expected, found = detector.eval()(images(2)), rebuilt(images(2))
    for one, other in zip(expected, found, strict=True):
        assert sorted(one) == sorted(other) == ["boxes", "labels", "scores"]
        assert all(torch.equal(one[key], other[key]) for key in one)


# weights from elsewhere


def test_student_inherits_neck_and_head_where_shapes_agree() -> None:
    torch.manual_seed(0)
    teacher = build_detector("retinanet_resnet18_fpn16", 3, 64)
    student = smallest("retinanet")
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    copied = inherit(student, teacher)
    neck = "net.backbone.fpn"
    blocks = {f"{neck}.layer_blocks.{place}.0" for place in range(3)}
    assert blocks | {f"{neck}.extra_blocks.p6", f"{neck}.extra_blocks.p7"} <= set(copied)
    assert "net.head.classification_head.cls_logits" in copied
    # the backbones differ in channels
    assert not any("inner_blocks" in path or "body" in path for path in copied)
    source = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        expected = source if name.rpartition(".")[0] in copied else before
        assert torch.equal(tensor, expected[name]), name


def test_inner_blocks_are_inherited_between_backbones_of_the_same_channels() -> None:
    with torch.device("meta"):
        teacher = build_detector("fcos_resnet34_fpn16", 3, 64)
        student = build_detector("fcos_resnet18_fpn16", 3, 64)
    assert "net.backbone.fpn.inner_blocks.0.0" in inherit(student, teacher)


def test_layers_of_the_classes_are_not_inherited_from_other_numbers_of_classes() -> None:
    copied = inherit(smallest("fcos"), smallest("fcos", classes=5))
    assert "net.head.classification_head.cls_logits" not in copied
    assert "net.head.regression_head.bbox_reg" in copied


@pytest.mark.parametrize(
    ("teacher", "width", "message"),
    [
        ("fasterrcnn", 16, r"different levels \(teacher: 2, 3, 4, 5; student: 3, 4, 5, 6, 7\)"),
        ("retinanet", 32, "no module of the teacher's neck and heads fits"),
    ],
)
def test_nothing_to_inherit_is_refused(teacher: str, width: int, message: str) -> None:
    pair = smallest("fcos"), smallest(teacher, width=width)
    assert inheritable(*pair) == {}
    with pytest.raises(ConfigError, match=message):
        inherit(*pair)


@pytest.mark.parametrize("part", ["detector", "torchvision"])
def test_weights_of_a_detector_are_loaded_from_a_file(part: str, tmp_path: Path) -> None:
    source, detector = smallest("retinanet"), smallest("retinanet")
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    state = (source if part == "detector" else source.net).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    assert load_weights(detector, tmp_path / "weights.pth") == []
    for name, tensor in detector.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_weights_under_torchvisions_old_names_and_with_frozen_norms_are_loaded(
    tmp_path: Path,
) -> None:
    source, detector = smallest("retinanet"), smallest("retinanet")
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    old = {
        name.replace("_blocks.0.0.", "_blocks.0."): tensor
        for name, tensor in source.net.state_dict().items()
        if "num_batches" not in name
    }
    torch.save(old, tmp_path / "weights.pth")
    assert load_weights(detector, tmp_path / "weights.pth") == []
    name = "backbone.fpn.inner_blocks.0.0.weight"
    assert torch.equal(detector.net.state_dict()[name], source.net.state_dict()[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_another_number_of_classes_keep_their_weights(
    family: str, tmp_path: Path
) -> None:
    source, detector = smallest(family, classes=5), smallest(family)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    kept = load_weights(detector, tmp_path / "weights.pth")
    layers = {
        "fasterrcnn": ["roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"],
        "ssdlite": [f"head.classification_head.module_list.{level}.1" for level in range(5)],
    }
    expected = layers.get(family, ["head.classification_head.cls_logits"])
    assert kept == [f"net.{layer}" for layer in expected]


def test_model_file_of_a_detector_of_other_classes_gives_its_weights(tmp_path: Path) -> None:
    sizes = {"image_size": (64, 64), "mean": (0.5,) * 3, "std": (0.2,) * 3}
    spec = ImageSpec(class_names=("a", "b"), task="detection", **sizes)
    file = untrained_file("retinanet_mobilenet_v3_small_fpn16", spec)
    save_model_file(tmp_path / "model.pt", file)
    detector = smallest("retinanet")
    kept = load_weights(detector, tmp_path / "model.pt")
    assert kept == ["net.head.classification_head.cls_logits"]
    for name, tensor in detector.state_dict().items():
        assert torch.equal(tensor, file.state_dict[name]) != name.startswith(kept[0]), name


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v3_small"])
def test_weights_of_a_classifier_are_loaded_into_the_body(backbone: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = build_detector(f"retinanet_{backbone}_fpn16", 3, 64)
    source = torchvision.models.get_model(backbone, weights=None)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    kept = load_weights(detector, tmp_path / "weights.pth")
    assert "net.backbone.fpn.inner_blocks.0.0" in kept
    assert not any("backbone.body" in path for path in kept)
    layers = source.features if backbone.startswith("mobilenet") else source
    for name, tensor in net_of(detector).backbone.body.state_dict().items():
        assert torch.equal(tensor, layers.state_dict()[name]), name


def resnet18(**changes: Tensor | None) -> dict[str, Tensor]:
    """Return a classifier's weights, some of them changed, added or (None) left out."""
    state = torchvision.models.resnet18().state_dict() | changes
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resnet18(**{"bn1.weight": None}), "lacks bn1.weight; use weights of the same ba"),
        (lambda: resnet18(**{"layer1.2.x": torch.zeros(1)}), "the detector has no layer1.2.x"),
        (lambda: resnet18(**{"bn1.bias": torch.zeros(2)}), r"bn1.bias has the shape \[2\], not "),
        (
            lambda: {"backbone.fpn.inner_blocks.0.bias": torch.zeros(2)},
            "its layers have other shapes",
        ),
        (lambda: {"features.0.weight": torch.zeros(1)}, "it lacks conv1.weight"),
        (
            lambda: {"weight": torch.zeros(1)},
            "does not contain weights of a detector, ResNet or MobileNetV3; use the weights of "
            "the detector or its backbone",
        ),
        (lambda: {"net.x": 1}, "is not a state dict"),
        (lambda: torch.zeros(1), "is not a state dict"),
        (
            lambda: nn.Linear(1, 1),
            "is damaged, or contains more than weights; save the weights with",
        ),
    ],
)
def test_file_that_does_not_fit_is_refused_in_one_line(
    make: Callable[[], object], message: str, tmp_path: Path
) -> None:
    torch.save(make(), tmp_path / "weights.pth")
    with pytest.raises(DataError, match=message) as caught:
        load_weights(build_detector("fcos_resnet18_fpn16", 3, 64), tmp_path / "weights.pth")
    assert str(tmp_path / "weights.pth") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    detector = smallest("fcos")
    with pytest.raises(DataError, match=r"cannot read .*No such file.*; pass a weights f"):
        load_weights(detector, tmp_path / "weights.pth")
    (tmp_path / "weights.pth").write_bytes(b"weights")
    with pytest.raises(DataError, match="is damaged"):
        load_weights(detector, tmp_path / "weights.pth")
