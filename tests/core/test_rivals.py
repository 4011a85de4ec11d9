"""CRD, ReviewKD, MGD, VRM and dense similarities against loops over their formulas, in float64.

Shape letters: B batch, C channels, H height, W width, E entries of an embedding, K classes.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_runs import make_training, random_batch, random_stream
from torch import Tensor, nn

from raygkd.assembly.recipes import unused_cache
from raygkd.config import Config, with_settings
from raygkd.engine import run_epoch
from raygkd.errors import ConfigError
from raygkd.losses import baseline_loss
from raygkd.losses.contrast import crd_loss
from raygkd.losses.dense import Queue, token_loss
from raygkd.losses.masked import generation_loss
from raygkd.losses.relations import vrm_loss
from raygkd.losses.review import hcl_loss

LABELS = [0, 1, 0, 2]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cosine(a: list[float], b: list[float]) -> float:
    lengths = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths


def divergence(p: list[float], q: list[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))


def softmax(row: list[float]) -> list[float]:
    total = sum(map(math.exp, row))
    return [math.exp(value) / total for value in row]


# CRD


def naive_crd(student: list, teacher: list, z: float | None = None) -> float:
    critic = [[math.exp(cosine(s, t) / 0.5) for t in teacher] for s in student]
    images = range(len(LABELS))
    compared = [critic[i][j] for i in images for j in images if i == j or LABELS[i] != LABELS[j]]
    z = z if z is not None else sum(compared) / len(compared)
    total = 0.0
    for i in images:
        noise = [j for j in images if LABELS[j] != LABELS[i]]
        for anchored in (lambda j, i=i: critic[i][j], lambda j, i=i: critic[j][i]):
            share = {j: anchored(j) / (anchored(j) + len(noise) * z) for j in (i, *noise)}
            total -= math.log(share[i]) + sum(math.log(1 - share[j]) for j in noise)
    return total / len(LABELS)


@pytest.mark.parametrize("log_scale", [None, 0.3])
def test_crd_follows_its_formula(log_scale: float | None):
    student, teacher = random(4, 5), random(4, 5, seed=1)
    scale = None if log_scale is None else torch.tensor(log_scale, dtype=torch.float64)
    loss = crd_loss(student, teacher, torch.tensor(LABELS), 0.5, scale)
    z = None if log_scale is None else math.exp(log_scale)
    expected = naive_crd(student.tolist(), teacher.tolist(), z)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_crd_has_the_gradient_of_its_formula_at_a_constant_scale():
    sides = random(4, 5).requires_grad_(), random(4, 5, seed=1).requires_grad_()
    labels, scale = torch.tensor(LABELS), torch.tensor(0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s, t: crd_loss(s, t, labels, 0.5, scale), sides)
    scores = (F.normalize(sides[0]) @ F.normalize(sides[1]).mT / 0.5).detach()
    compared = scores[(labels[:, None] != labels) | torch.eye(4, dtype=torch.bool)]
    own_scale = compared.exp().mean().log()
    own = torch.autograd.grad(crd_loss(*sides, labels, 0.5), sides)
    torch.testing.assert_close(
        own, torch.autograd.grad(crd_loss(*sides, labels, 0.5, own_scale), sides)
    )


def test_crd_reads_the_means_of_the_maps_and_the_largest_share_of_a_mixed_image():
    shapes = {"student_shapes": {1: (3, 2, 2)}, "teacher_shapes": {1: (5, 2, 2)}}
    module: Any = baseline_loss("crd", temperature=0.5, dim=4, **shapes).double()
    maps = {"student": random(4, 3, 2, 2), "teacher": random(4, 5, 2, 2, seed=1)}
    embedded = [
        getattr(module, f"{side}_embeddings")["1"](of.mean((2, 3))).tolist()
        for side, of in maps.items()
    ]
    labels = torch.tensor(LABELS)
    shares = 0.7 * F.one_hot(labels, 3) + 0.3 * F.one_hot(torch.tensor([1, 2, 0, 1]))
    given = {f"{side}_features": {1: of} for side, of in maps.items()}
    for targets in (labels, shares):
        assert module(**given, targets=targets).item() == pytest.approx(naive_crd(*embedded))


def test_images_of_one_class_have_no_noise_and_a_finite_gradient():
    student = random(3, 5).requires_grad_()
    loss = crd_loss(student, random(3, 5, seed=1), torch.zeros(3).long(), 0.5)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert student.grad.isfinite().all()


# ReviewKD


@pytest.mark.parametrize(
    ("side", "weights"),
    [(8, {4: 0.5, 2: 0.25, 1: 0.125}), (3, {2: 0.5, 1: 0.25}), (2, {1: 0.5}), (1, {})],
)
def test_hcl_by_hand(side: int, weights: dict[int, float]):
    student, teacher = random(2, 3, side, side), random(2, 3, side, side, seed=1)
    expected = (student - teacher).square().mean()
    for grid, weight in weights.items():
        pooled = F.adaptive_avg_pool2d(student - teacher, grid)
        expected = expected + weight * pooled.square().mean()
    expected = expected / (1 + sum(weights.values()))
    assert hcl_loss(student, teacher).item() == pytest.approx(expected.item(), rel=1e-12)


def batch_norm(maps: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    variance, mean = torch.var_mean(maps, (0, 2, 3), correction=0, keepdim=True)
    gain, bias = norm.weight[None, :, None, None], norm.bias[None, :, None, None]
    return (maps - mean) / (variance + norm.eps).sqrt() * gain + bias


def nearest(maps: Tensor, like: Tensor) -> Tensor:
    """Return maps on the grid of others, each position of which takes the nearest before it."""
    rows, columns = (
        torch.arange(new) * old // new
        for new, old in zip(like.shape[2:], maps.shape[2:], strict=True)
    )
    return maps[:, :, rows][:, :, :, columns]


def naive_review(module: Any, student: list[Tensor], teacher: list[Tensor]) -> float:
    """Return the loss of levels from shallow to deep, without the module's own code."""
    student = [*student, student[-1].mean((2, 3), keepdim=True)]
    teacher = [*teacher, teacher[-1].mean((2, 3), keepdim=True)]
    total, fused = 0.0, None
    for fusion, maps, target in reversed([*zip(module.fusions, student, teacher, strict=True)]):
        mixed = batch_norm(F.conv2d(maps, fusion.narrow[0].weight), fusion.narrow[1])
        if fused is not None:
            deeper = nearest(fused, mixed)
            layer, both = fusion.attention[0], torch.cat([mixed, deeper], 1)
            scores = torch.einsum("bchw,oc->bohw", both, layer.weight[..., 0, 0])
            gates = 1 / (1 + torch.exp(-(scores + layer.bias[None, :, None, None])))
            mixed = mixed * gates[:, 0:1] + deeper * gates[:, 1:2]
        fused = nearest(mixed, target)
        wide = F.conv2d(fused, fusion.widen[0].weight, padding=1)
        total += hcl_loss(batch_norm(wide, fusion.widen[1]), target).item()
    return total


def test_reviewkd_follows_its_formula():
    student = {1: random(3, 4, 6, 6), 2: random(3, 6, 3, 3, seed=1)}
    teacher = {1: random(3, 5, 4, 4, seed=2), 2: random(3, 7, 4, 4, seed=3)}
    shapes = {
        f"{side}_shapes": {level: tuple(maps.shape[1:]) for level, maps in of.items()}
        for side, of in (("student", student), ("teacher", teacher))
    }
    torch.manual_seed(0)
    module = baseline_loss("reviewkd", **shapes).double()
    expected = naive_review(module, [*student.values()], [*teacher.values()])
    value = module(student_features=student, teacher_features=teacher)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert len(module.fusions) == 3
    assert module.fusions[0].narrow[0].out_channels == 6


# MGD


def test_generated_maps_differ_by_a_sum_per_image():
    generated, teacher = random(2, 3, 2, 2), random(2, 3, 2, 2, seed=1)
    differences = (generated - teacher).flatten().tolist()
    expected = sum(value**2 for value in differences) / 2
    assert generation_loss(generated, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_mgd_generates_the_teachers_map_from_what_the_mask_leaves():
    shapes = {"student_shapes": {1: (3, 8, 8)}, "teacher_shapes": {1: (4, 8, 8)}}
    module: Any = baseline_loss("mgd", masked=0.25, **shapes).double()
    seen: list[Tensor] = []
    module.generators["1"].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    student, teacher = random(50, 3, 8, 8), random(50, 4, 8, 8, seed=1)
    value = module(student_features={1: student}, teacher_features={1: teacher})
    aligned = F.conv2d(student, module.adapters["1"].weight, module.adapters["1"].bias)
    is_missing = (seen[0] == 0).all(1, keepdim=True)
    assert torch.equal(seen[0], aligned * ~is_missing)
    assert is_missing.double().mean().item() == pytest.approx(0.25, abs=0.03)
    assert len({mask.numpy().tobytes() for mask in is_missing}) == 50
    first, last = module.generators["1"][0], module.generators["1"][2]
    hidden = F.conv2d(seen[0], first.weight, first.bias, padding=1).relu()
    expected = (F.conv2d(hidden, last.weight, last.bias, padding=1) - teacher).square().sum() / 50
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)


# VRM


def direction(first: list[float], second: list[float]) -> list[float]:
    difference = [x - y for x, y in zip(first, second, strict=True)]
    length = max(0.1, math.hypot(*difference))
    return [value / length for value in difference]


def huber(first: list[float], second: list[float]) -> float:
    errors = [abs(x - y) for x, y in zip(first, second, strict=True)]
    return sum(e**2 / 2 if e < 1 else e - 0.5 for e in errors)


def standard(row: list[float]) -> list[float]:
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in row) / (len(row) - 1))
    return [(value - mean) / (deviation + 1e-7) for value in row]


def naive_vrm(student: Tensor, teacher: Tensor, left_out: int) -> tuple[float, float]:
    """Return the terms of images and of classes; the worst ``left_out`` edges are left out."""
    sides = [[standard(row) for row in side.tolist()] for side in (student, teacher)]
    rows, half = range(len(student)), (len(student) + 1) // 2
    chances = [softmax(row) for row in student.tolist()]
    edges = []
    for m in rows[:half]:
        for n in rows[half:]:
            both = list(zip(chances[m], chances[n], strict=True))
            disagreement = -sum(p * math.log(q) + q * math.log(p) for p, q in both)
            loss = huber(*(direction(side[m], side[n]) for side in sides))
            edges.append((disagreement, loss))
    kept = [loss for _, loss in sorted(edges)[: len(edges) - left_out]]
    columns = [list(zip(*side, strict=True)) for side in sides]
    classes = range(student.shape[1])
    pairs = [
        huber(*(direction(side[i], side[j]) for side in columns))
        for i in classes
        for j in classes[i + 1 :]
    ]
    return sum(kept) / len(kept), sum(pairs) / len(pairs)


@pytest.mark.parametrize("rows", [6, 5])
@pytest.mark.parametrize(("pruned", "left_out"), [(0.0, 0), (0.5, 4), (0.4, 3)])
def test_vrm_follows_its_formula(rows: int, pruned: float, left_out: int):
    student, teacher = random(rows, 4), random(rows, 4, seed=1)
    left_out = left_out if rows == 6 else int(pruned * 6)
    images, classes = naive_vrm(student, teacher, left_out)
    value = vrm_loss(student, teacher, 2.0, 3.0, pruned)
    assert value.item() == pytest.approx(2 * images + 3 * classes, rel=1e-12)
    alone = vrm_loss(student, teacher, 0.0, 1.0, pruned)
    assert alone.item() == pytest.approx(classes, rel=1e-12)


def test_two_predictions_by_hand():
    """The edges are (1, -1) / sqrt(2) and its opposite, which differ by sqrt(2) in each entry."""
    logits = torch.tensor([[3.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    by_hand = 2 * (math.sqrt(2) - 0.5)
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        assert vrm_loss(logits, -logits, *weights, 0.0).item() == pytest.approx(by_hand, rel=1e-6)
        assert vrm_loss(logits, 7 * logits + 2, *weights, 0.0).item() == pytest.approx(0, abs=1e-12)


def test_vrm_is_the_same_in_another_order_scale_and_place():
    student, teacher = random(8, 5), random(8, 5, seed=1)
    value = vrm_loss(student, teacher, 1.0, 1.0, 0.25)
    order = torch.tensor([2, 0, 3, 1, 7, 4, 6, 5])
    torch.testing.assert_close(vrm_loss(student[order], teacher[order], 1.0, 1.0, 0.25), value)
    classes = torch.tensor([4, 2, 0, 1, 3])
    same = vrm_loss(student[:, classes], teacher[:, classes], 1.0, 1.0, 0.25)
    torch.testing.assert_close(same, value)
    scales, shifts = random(8, 1, seed=2).exp(), random(8, 1, seed=3)
    same = vrm_loss(student, teacher * scales + shifts, 1.0, 1.0, 0.25)
    torch.testing.assert_close(same, value, rtol=1e-5, atol=0)


def test_views_with_the_same_logits_have_no_direction():
    student = random(3, 5).repeat(2, 1).requires_grad_()
    value = vrm_loss(student, random(6, 5, seed=1), 1.0, 0.0, 0.0)
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 10


def test_vrm_trains_on_two_views_of_each_image():
    training = make_training(random_stream(2), method="vrm", epochs=1)
    batch = random_batch()
    shown = training.shown(batch, 0)
    assert torch.equal(shown["label"], batch["label"].repeat(2))
    assert torch.equal(shown["image"][:64], batch["image"])
    is_changed = (shown["image"][64:] != batch["image"]).flatten(1).any(1)
    assert is_changed.double().mean() > 0.5
    assert torch.equal(training.shown(batch, 0)["image"], shown["image"])
    assert not torch.equal(training.shown(batch, 1)["image"], shown["image"])
    seen: list[int] = []
    training.objective.baseline.register_forward_pre_hook(
        lambda _, __, given: seen.append(len(given["teacher_logits"])), with_kwargs=True
    )
    run_epoch(training)
    assert set(seen) == {128}


def test_second_views_are_mixed_like_the_first():
    training = make_training(random_stream(1), method="vrm", mixup=1.0)
    shown = training.shown(random_batch(), 0)
    assert shown["shares"].shape == (128, 10)
    assert (shown["shares"] < 1).any()
    assert make_training(random_stream(1), method="kd").shown(batch := random_batch(), 0) is batch


def test_second_views_are_not_looked_up():
    given = {"method": "vrm", "teacher_cache_mb": 10}
    assert "--method vrm changes images" in str(unused_cache(with_settings(Config(), given)))


# Dense similarities


def naive_tokens(student: Tensor, teacher: Tensor) -> float:
    total, rows = 0.0, 0
    for pair in zip(student, teacher, strict=True):
        tokens = [maps.flatten(1).T.tolist() for maps in pair]
        for one in range(len(tokens[0])):
            p_s, p_t = (
                softmax([cosine(side[one], other) / 0.5 for other in side]) for side in tokens
            )
            total += divergence(p_t, p_s)
            rows += 1
    return total / rows


def test_tokens_follow_their_formula():
    student, teacher = random(2, 3, 2, 3), random(2, 5, 2, 3, seed=1)
    expected = naive_tokens(student, teacher)
    assert token_loss(student, teacher, 0.5).item() == pytest.approx(expected, rel=1e-12)


def test_the_students_grid_becomes_the_teachers():
    student, teacher = random(2, 3, 4, 4), random(2, 5, 2, 2, seed=1)
    resized = F.interpolate(student, (2, 2), mode="bilinear", antialias=True)
    assert token_loss(student, teacher, 0.5).item() == pytest.approx(naive_tokens(resized, teacher))


def test_a_queue_keeps_the_latest_vectors():
    queue = Queue(3, 2).double()
    queue.push(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    one = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert queue.scores(one)[0, :2].tolist() == [1, 2]
    assert queue.scores(one).softmax(1)[0, 2] == 0
    queue.push(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
    assert queue.scores(one).tolist() == [[4, 2, 3]]
    queue.push(torch.arange(10.0).view(5, 2))
    assert sorted(queue.scores(one)[0].tolist()) == [4, 6, 8]


def test_dense_compares_images_with_those_before_them():
    shapes = {"student_shapes": {1: (3, 2, 2)}, "teacher_shapes": {1: (5, 2, 2)}}
    module: Any = baseline_loss("dense", temperature=0.5, queue=6, **shapes).double()
    batches = [(random(2, 3, 2, 2, seed=n), random(2, 5, 2, 2, seed=n + 9)) for n in range(2)]
    values = [
        module(student_features={1: student}, teacher_features={1: teacher}).item()
        for student, teacher in batches
    ]
    known = [row for _, teacher in batches for row in teacher.mean((2, 3)).tolist()]
    for number, (student, teacher) in enumerate(batches):
        projected = module.projections["1"](student.mean((2, 3))).tolist()
        rows = []
        for s, t in zip(projected, teacher.mean((2, 3)).tolist(), strict=True):
            p_s, p_t = (
                softmax([cosine(one, other) / 0.5 for other in known[: 2 + 2 * number]])
                for one in (s, t)
            )
            rows.append(divergence(p_t, p_s))
        expected = naive_tokens(student, teacher) + sum(rows) / len(rows)
        assert values[number] == pytest.approx(expected, rel=1e-12)


def test_evaluation_adds_nothing_to_the_queue():
    shapes = {"student_shapes": {1: (3, 2, 2)}, "teacher_shapes": {1: (3, 2, 2)}}
    module: Any = baseline_loss("dense", **shapes).double()
    maps = {1: random(2, 3, 2, 2)}
    module(student_features=maps, teacher_features=maps)
    module.eval()(student_features=maps, teacher_features=maps)
    assert module.queues["1"].count == 2


@pytest.mark.parametrize("name", ["crd", "reviewkd", "mgd", "dense"])
def test_shapes_are_needed(name: str):
    with pytest.raises(ConfigError, match=f"^{name} needs student_shapes and teacher_shapes"):
        baseline_loss(name)
