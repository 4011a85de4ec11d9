"""One small architecture of each of timm's modules: maps and logits are those of timm."""

from __future__ import annotations

from collections import defaultdict

import pytest
import timm
import torch
from timm.models import model_entrypoint

from raygkd.models import FeatureTap, build_model, stage_modules

pytestmark = pytest.mark.slow
# parts of the names of small architectures, smallest first
SMALL = ("test_", "atto", "femto", "pico", "nano", "xxs", "_xs", "tiny", "b0", "m0", "s0", "18")
# only large ones, or for large images: the smallest takes a minute or more on a CPU
LARGE = {"deepseek_vit", "gemma4_vit", "qwen3_vit", "vision_transformer_sam"}


def architectures() -> dict[str, str]:
    """Return module of timm -> name of a small architecture in it."""
    of_module = defaultdict(list)
    for name in timm.list_models():
        of_module[model_entrypoint(name).__module__.rpartition(".")[2]].append(name)

    def size(name: str) -> tuple[int, int, str]:
        places = [place for place, part in enumerate(SMALL) if part in name]
        return min(places, default=len(SMALL)), len(name), name

    return {module: min(names, key=size) for module, names in of_module.items()}


@pytest.mark.parametrize(("module", "name"), sorted(architectures().items()))
def test_maps_and_logits_are_those_of_timm(module: str, name: str) -> None:
    if module in LARGE:
        pytest.skip("takes minutes")
    side = timm.get_pretrained_cfg(name).input_size[1]
    torch.manual_seed(0)
    model = build_model(f"timm:{name}", 7, (side, side)).eval()
    levels = list(stage_modules(model))
    images = torch.randn(1, 3, side, side)
    with torch.no_grad():
        logits, maps = FeatureTap(model, levels)(images)
        assert torch.allclose(logits, model.net(images), atol=1e-6)
    assert logits.shape == (1, 7)
    assert 1 <= len(levels) <= 6
    for map_BCHW in maps.values():
        assert map_BCHW.ndim == 4
        # a square image gives square maps
        assert map_BCHW.shape[2] == map_BCHW.shape[3] < side + 1
