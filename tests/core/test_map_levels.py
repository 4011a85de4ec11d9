"""Levels of transformers and channels-last models, and which levels are paired.

Shapes: B batch, C channels, H height, W width, K classes, N tokens.
"""

import pytest
import torch
import torchvision
from torch import nn

from raygkd import Matching
from raygkd.errors import ConfigError
from raygkd.models import FeatureTap, build_model, feature_shapes, pair_levels, stage_modules
from raygkd.models.map_layouts import MapLayout, find_layout


def vit(image_size: int, patch: int = 8) -> nn.Module:
    """Return a small vision transformer of fixed image size with six blocks."""
    return torchvision.models.VisionTransformer(
        image_size=image_size,
        patch_size=patch,
        num_layers=6,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        num_classes=5,
    )


def swin() -> nn.Module:
    """Return a small Swin transformer of three resolutions."""
    return torchvision.models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=12,
        depths=[1, 2, 1],
        num_heads=[1, 2, 4],
        window_size=[4, 4],
        num_classes=5,
    )


def test_blocks_of_an_isotropic_transformer_are_taken_at_quarters_of_its_depth():
    paths = stage_modules(vit(64), (64, 64))
    assert paths == {
        level: f"encoder.layers.encoder_layer_{block}"
        for level, block in enumerate((1, 2, 4, 5), start=1)
    }


def test_stages_of_a_channels_last_transformer_are_its_resolutions():
    model = swin()
    assert stage_modules(model) == {1: "features.1", 2: "features.3", 3: "features.5"}
    shapes = feature_shapes(model, [1, 2, 3], (64, 64))
    assert shapes == {1: (12, 16, 16), 2: (24, 8, 8), 3: (48, 4, 4)}


@pytest.mark.parametrize("make", [lambda: vit(64), swin])
def test_maps_of_transformers_are_those_of_their_blocks_and_have_gradients(make):
    torch.manual_seed(0)
    model = make().eval()
    model.input_size = (64, 64)
    images_BCHW = torch.randn(2, 3, 64, 64)
    outputs = {}
    paths = stage_modules(model)
    expected = feature_shapes(model, list(paths), (64, 64))
    for level, path in paths.items():
        model.get_submodule(path).register_forward_hook(
            lambda module, inputs, output, level=level: outputs.update({level: output})
        )
    logits_BK, maps = FeatureTap(model, list(paths))(images_BCHW)
    assert torch.equal(logits_BK, model(images_BCHW))
    for level, map_BCHW in maps.items():
        assert tuple(map_BCHW.shape[1:]) == expected[level]
        output = outputs[level]
        # position 1 of row 1 stands behind the class token and the first row
        at = output[:, 1 + 8 + 1] if output.ndim == 3 else output[:, 1, 1]
        assert torch.equal(map_BCHW[:, :, 1, 1], at)
    sum(map_BCHW.square().sum() for map_BCHW in maps.values()).backward()
    first = next(iter(model.parameters()))
    assert first.grad is not None
    assert first.grad.abs().sum() > 0


class BlockOfTwo(nn.Module):
    """A block that returns its tokens in a tuple, as transformers' blocks do."""

    def forward(self, tokens_BNC):
        return tokens_BNC * 2, None


class Registers(nn.Module):
    """A transformer with a class token and four registers before its patches."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 8, 8)
        self.layer = nn.ModuleList([BlockOfTwo() for _ in range(4)])
        self.head = nn.Linear(6, 5)

    def forward(self, images_BCHW):
        tokens_BNC = self.patches(images_BCHW).flatten(2).transpose(1, 2)
        first_BNC = torch.full_like(tokens_BNC[:, :5], 7.0)
        tokens_BNC = torch.cat([first_BNC, tokens_BNC], 1)
        for block in self.layer:
            tokens_BNC = block(tokens_BNC)[0]
        return self.head(tokens_BNC[:, 0])


def test_class_and_register_tokens_are_dropped():
    torch.manual_seed(0)
    model, images_BCHW = Registers(), torch.randn(2, 3, 64, 64)
    assert list(stage_modules(model).values()) == [f"layer.{block}" for block in range(4)]
    _, maps = FeatureTap(model, [1])(images_BCHW)
    torch.testing.assert_close(maps[1], 2 * model.patches(images_BCHW))


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((1, 16, 8, 8), MapLayout()),
        ((1, 8, 8, 16), MapLayout("BHWC")),
        ((1, 64, 12), MapLayout("BNC", 0, (8, 8))),
        ((1, 65, 12), MapLayout("BNC", 1, (8, 8))),
        ((1, 66, 12), MapLayout("BNC", 2, (8, 8))),
        ((1, 69, 12), MapLayout("BNC", 5, (8, 8))),
        ((1, 1, 12), None),
        ((1, 12), None),
        ((1, 3, 8, 9), None),
    ],
)
def test_layout_is_told_by_the_shape_of_the_output(shape, layout):
    assert find_layout(shape, (64, 64)) == layout


def test_layout_of_wide_images_has_their_proportions():
    assert find_layout((1, 33, 12), (32, 64)) == MapLayout("BNC", 1, (4, 8))


def test_tokens_that_make_no_grid_are_refused():
    with pytest.raises(ConfigError, match="11 tokens do not form a square grid"):
        MapLayout("BNC", 1).read(torch.zeros(2, 12, 4))


def shapes(*heights: int) -> dict[int, tuple[int, int, int]]:
    return {level: (4, height, height) for level, height in enumerate(heights, start=1)}


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        # the same strides: one by one
        ((32, 16, 8), (32, 16, 8), {1: 1, 2: 2, 3: 3}),
        # efficientnet_b0 -> resnet18: the finest level of the teacher has no partner
        ((56, 28, 14, 7), (112, 56, 28, 14, 7), {1: 2, 2: 3, 3: 4, 4: 5}),
        # a ViT teacher: one grid, by depth
        ((112, 56, 28, 14, 7), (14, 14, 14, 14), {2: 1, 3: 2, 4: 3, 5: 4}),
        ((14, 14, 14, 14), (14, 14, 14, 14), {1: 1, 2: 2, 3: 3, 4: 4}),
        # a teacher that sees larger images
        ((32, 16, 8), (56, 28, 14, 7), {1: 2, 2: 3, 3: 4}),
        ((8,), (32, 16, 8), {1: 3}),
        ((32, 16, 8), (), {}),
    ],
)
def test_levels_of_like_resolution_and_depth_are_paired(student, teacher, pairs):
    assert pair_levels(shapes(*student), shapes(*teacher)) == pairs


def test_matching_finds_the_levels_of_models_that_refuse_224_pixels():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    student = build_model("resnet8", 5, (32, 32))
    matching = Matching(vit(32), student, images)
    outputs, loss = matching(images)
    assert outputs.shape == (4, 5)
    loss.backward()
    assert student.stem[0].weight.grad.abs().sum() > 0
    matching.close()


def test_matching_takes_named_blocks_that_give_tokens():
    images = torch.randn(4, 3, 32, 32)
    student = build_model("resnet8", 5, (32, 32))
    levels = {"stage3": "encoder.layers.encoder_layer_5"}
    matching = Matching(vit(32), student, images, levels=levels)
    assert dict(matching.graph.teacher_shapes) == {1: (16, 4, 4)}
    with pytest.raises(ConfigError, match=r"module 'heads' of the teacher gives \(4, 5\)"):
        Matching(vit(32), student, images, levels={"stage3": "heads"})
