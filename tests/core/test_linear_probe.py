"""The last layer of a probed teacher.

Shapes: N images, D features, K classes.
"""

import numpy as np
import pytest
import torch
from torch import nn

from raygkd.errors import ConfigError, DataError
from raygkd.models import build_classifier
from raygkd.models.heads import check_gives_logits, inputs_of, last_linear
from raygkd.rayrun.linear_probe import ABSENT_BIAS, Features, fit


def clusters(classes: tuple[int, ...], count: int, seed: int) -> Features:
    """Return features around a centre per class, of very different scales."""
    random = np.random.default_rng(seed)
    labels_N = np.array(classes)[random.integers(0, len(classes), count)]
    centres_KD = np.random.default_rng(0).normal(size=(10, 6)) * 3
    inputs_ND = centres_KD[labels_N] + random.normal(size=(count, 6))
    scales_D = np.array([1e-3, 1.0, 1e3, 1.0, 1.0, 1.0])
    return Features((inputs_ND * scales_D + 5.0).astype(np.float32), labels_N.astype(np.int64))


@pytest.mark.parametrize("classes", [(0, 1), (0, 1, 2, 3), (1, 4)])
def test_logits_of_the_layer_tell_the_classes(classes):
    train, val = clusters(classes, 400, seed=1), clusters(classes, 200, seed=2)
    weight_KD, bias_K, score = fit(train, val, num_classes=5)
    found_N = (val.inputs_ND @ weight_KD.T + bias_K).argmax(1)
    assert (found_N == val.labels_N).mean() == pytest.approx(score)
    assert score > 0.95
    absent = sorted(set(range(5)) - set(classes))
    assert (bias_K[absent] == ABSENT_BIAS).all()
    assert not weight_KD[absent].any()


def test_probabilities_are_those_of_the_regression():
    from sklearn.linear_model import LogisticRegression

    train = clusters((0, 1), 300, seed=3)
    weight_KD, bias_K, _ = fit(train, train, num_classes=2)
    logits_NK = torch.from_numpy(train.inputs_ND @ weight_KD.T + bias_K)
    mean_D, scale_D = train.inputs_ND.mean(0), train.inputs_ND.std(0)
    standard_ND = (train.inputs_ND - mean_D) / scale_D
    oracles = [
        LogisticRegression(C=c).fit(standard_ND, train.labels_N) for c in (1e-3, 1e-2, 0.1, 1)
    ]
    gaps = [
        np.abs(one.predict_proba(standard_ND) - logits_NK.softmax(1).numpy()).max()
        for one in oracles
    ]
    assert min(gaps) < 1e-3


@pytest.mark.parametrize("train", [clusters((2,), 20, seed=1), clusters((0, 1), 20, seed=1)])
def test_too_few_classes_or_images_are_refused(train):
    nothing = Features(train.inputs_ND[:0], train.labels_N[:0])
    with pytest.raises(DataError, match="two classes or more, and validation images"):
        fit(train, nothing, num_classes=5)


def test_last_layer_is_found_and_what_it_reads_is_seen():
    model = build_classifier("resnet8", 7).eval()
    path, layer = last_linear(model, 7)
    assert path == "classifier"
    with inputs_of(layer) as seen:
        logits = model(torch.randn(2, 3, 8, 8))
    assert torch.equal(layer(seen[0]), logits)
    assert not layer._forward_pre_hooks


def test_classifier_without_a_linear_last_layer_is_refused():
    with pytest.raises(ConfigError, match="has no linear last layer for 4 classes"):
        last_linear(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()), 4)


def test_features_that_are_not_finite_are_refused():
    train = clusters((0, 1), 20, seed=1)
    broken = Features(train.inputs_ND * np.float32(np.inf), train.labels_N)
    with pytest.raises(DataError, match="the teacher's features are not finite"):
        fit(broken, train, num_classes=2)


class TwoHeads(nn.Module):
    """Averages the logits of two heads, as distilled transformers do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, images_BCHW):
        pooled_BC = images_BCHW.mean((2, 3))
        return (self.first(pooled_BC) + self.second(pooled_BC)) / 2


def test_a_layer_that_does_not_give_the_logits_alone_is_no_head_to_probe():
    plain = build_classifier("resnet8", 2)
    check_gives_logits(last_linear(plain, 2)[1], plain, (8, 8))
    assert plain.training
    two = TwoHeads()
    with pytest.raises(ConfigError, match="not the output of its last linear layer; choose"):
        check_gives_logits(last_linear(two, 2)[1], two, (8, 8))
