"""Image classifiers of transformers: their maps, inputs and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raygkd.errors import ConfigError, DataError
from raygkd.models import (
    FeatureTap,
    ModelInput,
    build_model,
    check_model_name,
    load_classifier,
    model_input,
    stage_modules,
)

transformers = pytest.importorskip("transformers")
TOKENS = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
TOKENS |= {"intermediate_size": 32, "image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]}
HALVED = [(8, 8, 8), (12, 4, 4), (16, 2, 2), (20, 1, 1)]
# kind -> its settings, and (C, H, W) of its levels at 32 pixels
KINDS: dict[str, tuple[dict[str, Any], list[tuple[int, int, int]]]] = {
    "ViT": (TOKENS, [(16, 4, 4)] * 4),
    "DeiT": (TOKENS, [(16, 4, 4)] * 4),
    "Beit": (TOKENS, [(16, 4, 4)] * 4),
    "Dinov2": (TOKENS, [(16, 4, 4)] * 4),
    "Dinov2WithRegisters": (TOKENS | {"num_register_tokens": 3}, [(16, 4, 4)] * 4),
    "Swin": (
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
        | {"image_size": 32, "patch_size": 4},
        [(8, 8, 8), (16, 4, 4)],
    ),
    "ConvNext": (STAGES, HALVED),
    "ResNet": (STAGES | {"embedding_size": 8}, HALVED),
}
PROCESSOR = {
    "do_resize": True,
    "size": {"shortest_edge": 36},
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "do_normalize": True,
    "image_mean": [0.5, 0.25, 0.5],
    "image_std": [0.5, 0.5, 0.25],
    "resample": 3,
}


def saved(folder: Path, kind: str) -> nn.Module:
    """Save a small model; return it."""
    torch.manual_seed(0)
    name = f"{kind}ForImageClassification"
    config = getattr(transformers, f"{kind}Config")(**KINDS[kind][0], num_labels=7)
    config.architectures = [name]
    model = getattr(transformers, name)(config).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_maps_logits_and_weights_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    theirs, name = saved(tmp_path, kind), f"hf:{tmp_path}"
    check_model_name(name)
    model = build_model(name, 7, (32, 32)).eval()
    weights = load_classifier(model, name, 7, None)
    assert weights is not None
    assert weights.is_whole
    images = torch.randn(2, 3, 32, 32)
    levels = list(stage_modules(model))
    with torch.no_grad():
        logits, maps = FeatureTap(model, levels)(images)
        wanted = theirs(pixel_values=images, output_hidden_states=True)
    assert torch.allclose(logits, wanted.logits, atol=1e-6)
    assert [tuple(maps[level].shape[1:]) for level in levels] == KINDS[kind][1]
    last = maps[levels[-1]]
    hidden = wanted.hidden_states[-1]
    if hidden.ndim == 3:  # the last tokens are those of the patches, row by row
        hidden = hidden[:, -last[0, 0].numel() :].transpose(1, 2).reshape(last.shape)
    assert torch.equal(last, hidden)


# kinds of which transformers has no classifier
BACKBONES = {"CLIPVision": 1, "SiglipVision": 0, "DINOv3ViT": 1}


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_backbone_without_a_classifier_gets_a_last_layer(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**TOKENS)
    theirs = getattr(transformers, f"{kind}Model")(config).eval()
    theirs.save_pretrained(tmp_path)
    name, images = f"hf:{tmp_path}", torch.randn(2, 3, 32, 32)
    model = build_model(name, 7, (32, 32)).eval()
    weights = load_classifier(model, name, 7, None)
    assert weights is not None
    assert weights.new_layers == ("classifier",)
    with torch.no_grad():
        logits, maps = FeatureTap(model, [1, 4])(images)
        wanted = theirs(pixel_values=images, output_hidden_states=True)
    assert logits.shape == (2, 7)
    tokens = wanted.hidden_states[-1][:, BACKBONES[kind] :]
    assert torch.equal(maps[4].flatten(2).transpose(1, 2), tokens)


def test_a_model_of_no_images_is_refused(tmp_path: Path) -> None:
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="transformers has no image model of type 'bert'"):
        build_model(f"hf:{tmp_path}", 3, (32, 32))


def test_a_checkpoint_of_several_files_is_loaded_whole(tmp_path: Path) -> None:
    theirs = saved(tmp_path, "ViT")
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    name = f"hf:{tmp_path}"
    model = build_model(name, 7, (32, 32)).eval()
    weights = load_classifier(model, name, 7, None)
    assert weights is not None
    assert weights.is_whole
    own = model.net.state_dict()
    assert all(torch.equal(own[n], tensor) for n, tensor in theirs.state_dict().items())
    before = weights.sha256
    part = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    part.write_bytes(part.read_bytes()[:-4] + b"\0\0\0\0")
    weights = load_classifier(model, name, 7, None)
    assert weights is not None
    assert weights.sha256 != before


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "Swin", "ConvNext"])
def test_other_sizes_and_classes_are_taken(tmp_path: Path, kind: str) -> None:
    theirs, name = saved(tmp_path, kind), f"hf:{tmp_path}"
    model = build_model(name, 3, (64, 64)).eval()
    # the default, and the same file as one of a person's own
    for given in (None, str(tmp_path / "model.safetensors")):
        weights = load_classifier(model, name, 3, given)
        assert weights is not None
        assert weights.new_layers == ("classifier",)
    own, wanted = model.net.state_dict(), theirs.state_dict()
    assert all(torch.equal(own[n], t) for n, t in wanted.items() if n[:10] != "classifier")
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_the_input_is_that_of_the_processor(tmp_path: Path) -> None:
    saved(tmp_path, "ViT")
    wanted = ModelInput((32, 32), (0.5, 0.25, 0.5), (0.5, 0.5, 0.25), "bicubic")
    assert model_input(f"hf:{tmp_path}") == wanted
    (tmp_path / "preprocessor_config.json").unlink()
    assert model_input(f"hf:{tmp_path}") == ModelInput()


def test_wrong_names_and_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'vit': is neither a folder nor of the form ORG/NAME"):
        check_model_name("hf:vit")
    with pytest.raises(ConfigError, match=r"the folder has no config\.json; pass one written"):
        check_model_name(f"hf:{tmp_path}")
    saved(tmp_path, "ViT")
    name = f"hf:{tmp_path}"
    model = build_model(name, 7, (32, 32))
    torch.save({"something": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(DataError, match=r"does not fit ViTForImageClassification.*1 unexpected"):
        load_classifier(model, name, 7, str(tmp_path / "other.pth"))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="pretrained: there are no weights of"):
        load_classifier(model, name, 7, "pretrained")


def test_code_of_a_repository_is_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(witness)!r}, 'w')\nclass Config: pass\n")
    own = {"AutoConfig": "own.Config", "AutoModelForImageClassification": "own.Config"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
    with pytest.raises(ConfigError, match=r"config\.json cannot be used"):
        build_model(f"hf:{tmp_path}", 3, (32, 32))
    assert not witness.exists()
