"""timm's models: their maps, inputs, names and weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from raygkd.errors import ConfigError, DataError
from raygkd.models import (
    FeatureTap,
    build_model,
    check_model_name,
    feature_shapes,
    is_classifier,
    load_classifier,
    model_input,
    stage_modules,
)

# name -> side of the input, and (C, H, W) of its levels
SHAPES = {
    # a stem of one strided convolution is no level
    "resnet10t": (64, [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]),
    "test_convnext": (64, [(24, 16, 16), (32, 8, 8), (48, 4, 4), (64, 2, 2)]),
    "swin_tiny_patch4_window7_224": (64, [(96, 16, 16), (192, 8, 8), (384, 4, 4), (768, 2, 2)]),
    "test_vit": (64, [(64, 4, 4)] * 4),
    "vit_tiny_patch16_224": (32, [(192, 2, 2)] * 4),
    # class and register tokens are left out
    "vit_small_patch14_reg4_dinov2": (56, [(384, 4, 4)] * 4),
}


@pytest.mark.parametrize("name", SHAPES)
def test_maps_and_logits_are_those_of_timm(name: str) -> None:
    side, shapes = SHAPES[name]
    torch.manual_seed(0)
    model = build_model(f"timm:{name}", 7, (side, side)).eval()
    levels = list(stage_modules(model))
    assert feature_shapes(model, levels, (side, side)) == dict(enumerate(shapes, start=1))
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        logits, maps = FeatureTap(model, levels)(images)
        assert torch.equal(logits, model.net(images))
        assert logits.shape == (2, 7)
        theirs = model.net.forward_intermediates(images, intermediates_only=True, norm=True)
    assert [tuple(maps[level].shape[1:]) for level in levels] == shapes
    if len({shape[1:] for shape in shapes}) == 1:
        # of a transformer, the last map is that after the norm
        assert torch.allclose(maps[levels[-1]], theirs[-1], atol=1e-5)


def test_a_backbone_of_another_size_gets_a_new_last_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("test_vit", num_classes=0)
    torch.save({"teacher": theirs.state_dict()}, tmp_path / "dino.pth")
    model = build_model("timm:test_vit", 5, (64, 64))
    weights = load_classifier(model, "timm:test_vit", 5, str(tmp_path / "dino.pth"))
    assert weights is not None
    assert weights.new_layers == ("head",)
    assert torch.equal(model.net.blocks[0].attn.qkv.weight, theirs.blocks[0].attn.qkv.weight)


def test_every_parameter_gets_a_gradient() -> None:
    model = build_model("timm:test_vit", 3, (32, 32)).train()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_input_is_that_of_the_weights() -> None:
    wanted = model_input("timm:vit_base_patch16_clip_224.openai")
    assert wanted.size == (224, 224)
    assert wanted.mean == (0.48145466, 0.4578275, 0.40821073)
    assert wanted.interpolation == "bicubic"


def test_unknown_names_and_tags_name_the_nearest() -> None:
    for name in ("timm:resnet18", "timm:resnet18.a1_in1k", "timm:hf-hub:timm/resnet18.a1_in1k"):
        assert is_classifier(name)
    for name, message in [
        ("timm:resnet18x", "unknown timm classifier 'resnet18x'; did you mean 'resnet18'"),
        ("timm:resnet18.a9", "(tags of resnet18: a1_in1k, a2_in1k"),
        ("timm:hf-hub:resnet18", "must be hf-hub:ORG/NAME"),
    ]:
        with pytest.raises(ConfigError) as caught:
            check_model_name(name)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_images_that_a_model_cannot_take_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot take images of 64 x 64 pixels") as caught:
        feature_shapes(build_model("timm:efficientformer_l1", 3, (64, 64)), (), (64, 64))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_of_timm_are_loaded_with_a_new_last_layer(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("test_efficientnet", num_classes=1000)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict_ema": theirs.state_dict(), "epoch": 1}, path)
    else:
        save_file(theirs.state_dict(), path)
    model = build_model("timm:test_efficientnet", 5, (64, 64))
    weights = load_classifier(model, "timm:test_efficientnet", 5, str(path))
    assert weights is not None
    assert weights.new_layers == ("classifier",)
    assert torch.equal(model.net.conv_stem.weight, theirs.conv_stem.weight)
    whole = build_model("timm:test_efficientnet", 1000, (64, 64)).eval()
    weights = load_classifier(whole, "timm:test_efficientnet", 1000, str(path))
    assert weights is not None
    assert weights.is_whole
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(whole(images), theirs.eval()(images))


@pytest.mark.parametrize("classes", [11, 5])
def test_position_embeddings_are_resized(tmp_path: Path, classes: int) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("test_vit", num_classes=11)
    save_file(theirs.state_dict(), tmp_path / "vit.safetensors")
    model = build_model("timm:test_vit", classes, (64, 64))
    weights = load_classifier(model, "timm:test_vit", classes, str(tmp_path / "vit.safetensors"))
    assert weights is not None
    assert weights.is_whole == (classes == 11)
    assert theirs.pos_embed.shape[1] == 101
    assert model.net.pos_embed.shape[1] == 17
    assert torch.equal(model.net.blocks[0].attn.qkv.weight, theirs.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("classes", [5, 9, 0])
def test_weights_of_another_model_are_refused(tmp_path: Path, classes: int) -> None:
    other = timm.create_model("test_resnet", num_classes=classes)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    model = build_model("timm:test_vit", 5, (64, 64))
    with pytest.raises(DataError, match=r"does not fit VisionTransformer.*missing \(blocks"):
        load_classifier(model, "timm:test_vit", 5, str(tmp_path / "other.pth"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's folder of downloads; there is no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def downloaded(hub: Path, repository: str) -> Path:
    """Return the folder of a repository's only revision."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_weights_come_from_the_folder_of_downloads(hub: Path) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("test_resnet", num_classes=1000)
    folder = downloaded(hub, "timm/test_resnet.r160_in1k")
    save_file(theirs.state_dict(), folder / "model.safetensors")
    model = build_model("timm:test_resnet", 5, (64, 64))
    weights = load_classifier(model, "timm:test_resnet", 5, None)
    assert weights is not None
    assert weights.source == "timm test_resnet.r160_in1k"
    assert (weights.licence, weights.new_layers) == ("apache-2.0", ("fc",))
    assert torch.equal(model.net.conv1[0].weight, theirs.conv1[0].weight)


def test_a_model_of_the_hub_is_built_from_its_configuration(hub: Path) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("test_resnet", num_classes=3)
    folder = downloaded(hub, "someone/flowers")
    save_file(theirs.state_dict(), folder / "model.safetensors")
    cfg = {"num_classes": 3, "input_size": [3, 48, 48], "mean": [0.5] * 3, "std": [0.25] * 3}
    cfg |= {"interpolation": "bilinear", "first_conv": "conv1.0", "classifier": "fc"}
    settings = {"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(settings))
    name = "timm:hf-hub:someone/flowers"
    model = build_model(name, 3, (48, 48)).eval()
    weights = load_classifier(model, name, 3, None)
    assert weights is not None
    assert weights.is_whole
    images = torch.randn(1, 3, 48, 48)
    assert torch.equal(model(images), theirs.eval()(images))
    assert model_input(name).std == (0.25, 0.25, 0.25)


def test_weights_that_cannot_be_fetched_are_never_random(hub: Path) -> None:
    model = build_model("timm:test_resnet", 5, (64, 64))
    with pytest.raises(DataError) as caught:
        load_classifier(model, "timm:test_resnet", 5, None)
    told = str(caught.value)
    assert "the pretrained weights of timm's test_resnet.r160_in1k cannot be downloaded" in told
    assert f"copy it into the cache {hub}, pass a weights FILE, or 'none'" in told
    assert "\n" not in told
    with pytest.raises(DataError, match=r"config\.json of timm:hf-hub:no/such cannot be"):
        build_model("timm:hf-hub:no/such", 5, (64, 64))


def test_models_without_weights_start_at_random_or_say_so() -> None:
    name = "timm:resnet14t"
    bare = next(n for n in timm.list_models() if not timm.get_pretrained_cfg(n).has_weights)
    assert load_classifier(build_model(name, 3, (32, 32)), name, 3, "none") is None
    model = torch.nn.Linear(1, 1)
    assert load_classifier(model, f"timm:{bare}", 3, None) is None
    for untrained in (f"timm:{bare}", "resnet8"):
        with pytest.raises(ConfigError, match="pretrained: there are no weights of"):
            load_classifier(model, untrained, 3, "pretrained")
