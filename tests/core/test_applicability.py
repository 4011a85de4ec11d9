"""Settings that would change nothing are refused, wherever they were given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raygkd.assembly.applicability import check_applies
from raygkd.config import Config, from_mapping, with_settings
from raygkd.config.search_space import Dimension
from raygkd.errors import ConfigError
from raygkd.losses.pyramids import focal_loss

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"method": "none", "dim": 4}, "--dim: has no effect on --method none; omit it"),
        ({"prg.edge": 2.0}, "--set prg.edge: has no effect on --method graph; omit it"),
        ({"kd_weight": 0.5}, "--kd-weight: has no effect on --method graph; omit it"),
        ({"milestones": (0.5,)}, "--milestones: has no effect without --schedule multistep"),
        ({"years": (2007,)}, "--years: has no effect without --dataset voc; omit it"),
        ({"csv.image": "x"}, "--set csv.image: has no effect on --dataset digits; omit it"),
        ({"attention": "softmax"}, "--attention: has no effect without --graphs image"),
        ({"budget_of": "int8"}, "--budget-of: has no effect without --max-mb, --max-latency-ms"),
    ],
)
def test_settings_without_effect(changed: dict[str, Any], told: str):
    with pytest.raises(ConfigError, match=f"^{told}"):
        check_applies("train", with_settings(Config(), changed))


def test_settings_with_effect_and_defaults():
    check_applies("train", Config())
    check_applies("train", from_mapping({"data": {"dataset": "digits-voc"}}))
    multistep = {"schedule": "multistep", "milestones": (0.5,), "graphs": "image"}
    check_applies("train", with_settings(Config(), multistep | {"attention": "softmax"}))
    check_applies("compare", with_settings(Config(), {"kd_weight": 0.5}))


def test_a_space_with_a_setting_of_another_method():
    with pytest.raises(ConfigError, match=r"^search space: kd_weight: has no effect on --method"):
        check_applies("tune", Config(), (Dimension("kd_weight", "choice", (0.5,)),))
    both = (Dimension("method", "choice", ("graph", "kd")), Dimension("kd_weight", "choice", (1,)))
    check_applies("tune", Config(), both)


def test_focal_loss_does_not_broadcast():
    maps = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ConfigError, match="same shape"):
        focal_loss(maps[:, :1], maps, torch.ones(2, 4, 4), 0.5)
