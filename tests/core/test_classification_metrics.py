import math

import pytest
import torch
import torch.nn.functional as F

from raygkd.errors import DataError
from raygkd.metrics.classification import ClassificationMeter, topk_correct


def random_batch(images=64, classes=10):
    generator = torch.Generator().manual_seed(0)
    logits_BK = torch.randn(images, classes, generator=generator)
    return logits_BK, torch.randint(classes, (images,), generator=generator)


def test_topk_counts_equal_those_of_sorting():
    logits_BK, labels_B = random_batch()
    counts = topk_correct(logits_BK, labels_B, (1, 3, 10))
    for k, count in counts.items():
        best = logits_BK.argsort(dim=1, descending=True)[:, :k]
        assert int(count) == sum(int(label in row) for row, label in zip(best, labels_B))
    assert not any(count.is_floating_point() for count in counts.values())


def test_equal_logits_are_won_by_the_lower_class_only():
    logits_BK, labels_B = torch.zeros(4, 4), torch.arange(4)
    assert topk_correct(logits_BK, labels_B, (1, 2)) == {1: 1, 2: 2}


def test_a_row_with_a_nan_is_wrong_wherever_the_nan_is():
    logits_BK = torch.tensor([[9.0, math.nan], [math.nan, 9.0], [math.nan, math.nan], [9.0, 0.0]])
    assert topk_correct(logits_BK, torch.tensor([0, 0, 0, 0]), (1, 2)) == {1: 1, 2: 1}


@pytest.mark.parametrize("k", [0, 4])
def test_a_k_outside_the_classes_is_refused(k):
    with pytest.raises(ValueError, match="from 1 to 3"):
        topk_correct(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long), [k])


def test_meter_gives_the_scores_of_the_whole_set_whatever_the_batches():
    logits_BK, labels_B = random_batch()
    meter = ClassificationMeter(10)
    for begin, end in ((0, 1), (1, 1), (1, 50), (50, 64)):
        meter.update(logits_BK[begin:end], labels_B[begin:end])
    scores = meter.compute()
    right_B = logits_BK.argmax(1) == labels_B
    assert scores["count"] == 64
    assert scores["accuracy"] == pytest.approx(right_B.double().mean().item(), abs=1e-12)
    assert scores["top5"] == int(topk_correct(logits_BK, labels_B, [5])[5]) / 64
    assert scores["loss"] == pytest.approx(
        F.cross_entropy(logits_BK.double(), labels_B).item(), abs=1e-12
    )
    assert scores["per_class"] == pytest.approx(
        [right_B[labels_B == c].double().mean().item() for c in range(10)], abs=1e-12
    )


def test_meters_of_two_ranks_reduce_to_the_meter_of_all_images():
    logits_BK, labels_B = random_batch()
    ranks = [ClassificationMeter(10) for _ in range(2)]
    sums = []
    for rank, meter in enumerate(ranks):
        meter.update(logits_BK[rank::2], labels_B[rank::2])
        meter.reduce(lambda total: sums.append(total) or total)
    assert sums[0].dtype == torch.float64
    ranks[0].reduce(lambda total: total + sums[1])
    whole = ClassificationMeter(10)
    whole.update(logits_BK, labels_B)
    merged, expected = ranks[0].compute(), whole.compute()
    assert merged.pop("loss") == pytest.approx(expected.pop("loss"), abs=1e-12)
    assert merged == expected


def test_class_without_images_has_no_score_and_few_classes_no_top5():
    meter = ClassificationMeter(3)
    meter.update(torch.eye(3)[:2], torch.tensor([0, 0]))
    scores = meter.compute()
    assert scores["per_class"] == [0.5, None, None]
    assert "top5" not in scores


def test_nan_logits_are_wrong_and_show_in_the_loss():
    meter = ClassificationMeter(6)
    meter.update(torch.full((4, 6), math.nan), torch.arange(4))
    scores = meter.compute()
    assert scores["accuracy"] == scores["top5"] == 0
    assert math.isnan(scores["loss"])


def test_half_precision_logits_that_need_gradients_are_taken():
    logits_BK, labels_B = random_batch()
    meter = ClassificationMeter(10)
    meter.update(logits_BK.bfloat16().requires_grad_(), labels_B)
    assert 0 < meter.compute()["loss"] < 10


def test_meter_without_images_says_so():
    with pytest.raises(DataError, match="no images"):
        ClassificationMeter(3).compute()
