"""The published losses against torchdistill, against loops over their formulas, and by hand.

Shape letters: B batch, C channels, H height, W width, K classes.
"""

import math
import re
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck

from raygkd.errors import ConfigError
from raygkd.losses import BaselineLoss, baseline_class, baseline_loss, baseline_names, kd_loss
from raygkd.losses.features import at_loss, hint_loss, ickd_loss, vid_loss
from raygkd.losses.levels import on_one_grid
from raygkd.losses.logits import dist_loss, dkd_loss, standardised_kd_loss
from raygkd.losses.pyramids import (
    GlobalContext,
    attention_loss,
    cwd_loss,
    focal_loss,
    focal_masks,
    pkd_loss,
)
from raygkd.losses.samples import pkt_loss, rkd_loss, sp_loss

NAMES = baseline_names()
IN_TORCHDISTILL = ("at", "rkd", "pkt", "vid", "dist")
LOGITS = [name for name in NAMES if baseline_class(name).reads == "logits"]
FEATURES = [name for name in NAMES if baseline_class(name).reads == "features"]
PAIRS = ("sp", "rkd", "pkt", "crd")
# they have modules of their own, and so no form without shapes
SHAPED = ("vid", "fgd", "crd", "reviewkd", "mgd", "dense", "graph-metrics", "prg")
ADAPTED = ("fitnet", "ickd", "fgd", "cwd", "pkd", *SHAPED)

# level -> (C, H, W): once the student is finer, once both agree, once the teacher is finer
STUDENT = {1: (4, 6, 6), 2: (6, 3, 3), 3: (8, 2, 2)}
TEACHER = {1: (6, 3, 3), 2: (6, 3, 3), 3: (10, 4, 4)}
CANVAS = 24
BOXES = [
    torch.tensor([[0.0, 3.0, 15.0, 13.0], [13.0, 1.0, 24.0, 7.0]]),
    torch.zeros(0, 4),
    torch.tensor([[2.0, 2.0, 4.0, 4.0]]),
]
TARGETS = torch.tensor([0, 5, 2])
SIDES = ("student", "teacher")
FEATURE_KEYS = ("student_features", "teacher_features")

each_name = pytest.mark.parametrize("name", NAMES)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def features(
    shapes: dict[int, tuple[int, int, int]], seed: int, dtype: torch.dtype = torch.float64
) -> dict[int, Tensor]:
    return {
        level: random(3, *shape, seed=seed + level, dtype=dtype) for level, shape in shapes.items()
    }


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return {
        "student_logits": random(3, 6, dtype=dtype),
        "teacher_logits": random(3, 6, seed=1, dtype=dtype),
        "student_features": features(STUDENT, 10, dtype),
        "teacher_features": features(TEACHER, 20, dtype),
        "targets": TARGETS,
        "boxes": BOXES,
        "student_embeddings": random(3, 5, seed=30, dtype=dtype),
        "teacher_embeddings": random(3, 7, seed=31, dtype=dtype),
        "student_proxies": random(6, 5, seed=32, dtype=dtype),
        "teacher_proxies": random(6, 7, seed=33, dtype=dtype),
    }


def build(name: str, **changes: Any) -> BaselineLoss:
    """Return a module in float64, all of whose parameters are away from where they start."""
    context = {"student_shapes": STUDENT, "teacher_shapes": TEACHER, "canvas": CANVAS}
    context |= {"embedding_sizes": (5, 7)} | changes
    if name == "dense":
        # as many as a batch has: another call of the same batch leaves it as it is
        context = {"queue": 3} | context
    torch.manual_seed(0)
    module = baseline_loss(name, **context).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    if name == "mgd":
        module.register_forward_pre_hook(draw_the_same_mask)
    return module


def draw_the_same_mask(*_: Any) -> None:
    torch.manual_seed(0)


def tensors_of(given: dict[str, Any], side: str) -> list[Tensor]:
    return [given[f"{side}_logits"], *given[f"{side}_features"].values()]


# Against torchdistill, through its own interface


def compared_by_torchdistill(name: str, student: Any, teacher: Tensor) -> Tensor:
    from torchdistill.losses import mid_level

    pair = {"io": "output", "path": "layer"}
    pairs = {"pair": {"student": pair, "teacher": pair}}
    paths = ("layer", "output", "layer", "output")
    loss = {
        "at": lambda: mid_level.ATLoss(pairs, mode="code"),
        "rkd": lambda: mid_level.RKDLoss("layer", "layer", 25.0, 50.0, reduction="mean"),
        "pkt": lambda: mid_level.PKTLoss(*paths),
        "vid": lambda: mid_level.VIDLoss(pairs),
        "dist": lambda: mid_level.DISTLoss(*paths, beta=1.0, gamma=1.0, tau=1.0),
    }[name]()
    return loss({"layer": {"output": student}}, {"layer": {"output": teacher}})


def torchdistills(name: str, module: BaselineLoss, given: dict[str, Any]) -> Tensor:
    """Return the value that torchdistill gives of what a module of ours reads."""
    if name == "dist":
        return compared_by_torchdistill(name, given["student_logits"], given["teacher_logits"])
    if name in ("rkd", "pkt"):
        embedded = [given[f"{side}_features"][3].mean((2, 3)) for side in ("student", "teacher")]
        return compared_by_torchdistill(name, *embedded)
    values = []
    for level in STUDENT:
        student, teacher = on_one_grid(
            given["student_features"][level], given["teacher_features"][level]
        )
        predicted = regressor_of(module, level)(student) if name == "vid" else student
        values.append(compared_by_torchdistill(name, predicted, teacher))
    return torch.stack(values).sum()


def regressor_of(module: BaselineLoss, level: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return torchdistill's regressor of a level with the parameters of ours, the same tensors."""
    from torchdistill.models.wrapper import Regressor4VID

    student, teacher = STUDENT[level][0], TEACHER[level][0]
    regressor = Regressor4VID(student, teacher, teacher, eps=1e-5, init_pred_var=5.0)
    ours = dict(module.regressors[str(level)].named_parameters())
    return lambda maps: torch.func.functional_call(regressor, ours, (maps,))


def with_gradients(value: Tensor, of: list[Tensor]) -> list[Tensor]:
    return [value, *torch.autograd.grad(value, of, materialize_grads=True)]


@pytest.mark.parametrize("name", IN_TORCHDISTILL)
def test_value_and_gradients_equal_torchdistills(name: str):
    module, given = build(name), inputs()
    of = [tensor.requires_grad_() for tensor in tensors_of(given, "student")]
    of += module.parameters()
    results = with_gradients(module(**given), of)
    expected = with_gradients(torchdistills(name, module, given), of)
    assert sum(bool(gradient.any()) for gradient in results[1:]) >= (1 if name != "vid" else 15)
    torch.testing.assert_close(results, expected, rtol=1e-10, atol=1e-15)


def test_weights_and_temperature_of_dist_equal_torchdistills():
    from torchdistill.losses.mid_level import DISTLoss

    student, teacher = random(5, 6).requires_grad_(), random(5, 6, seed=1)
    criterion = DISTLoss("layer", "output", "layer", "output", beta=0.5, gamma=2.0, tau=3.0)
    expected = criterion({"layer": {"output": student}}, {"layer": {"output": teacher}})
    results = with_gradients(dist_loss(student, teacher, 0.5, 2.0, 3.0), [student])
    torch.testing.assert_close(results, with_gradients(expected, [student]), rtol=1e-12, atol=1e-15)


def test_vid_loads_a_state_of_torchdistills_regressors():
    """As checkpoints of runs have it that were made with them."""
    from torchdistill.models.wrapper import Regressor4VID

    regressors = nn.ModuleDict(
        {
            str(level): Regressor4VID(STUDENT[level][0], channels, channels, 1e-5, 5.0)
            for level, (channels, _, _) in TEACHER.items()
        }
    )
    state = {f"regressors.{key}": value for key, value in regressors.state_dict().items()}
    module = baseline_loss("vid", student_shapes=STUDENT, teacher_shapes=TEACHER)
    for key in [key for key in state if key.endswith("soft_plus_param")]:
        torch.testing.assert_close(module.state_dict()[key], state[key])
    module.load_state_dict(state)
    assert torch.equal(
        module.state_dict()["regressors.2.regressor.4.weight"],
        state["regressors.2.regressor.4.weight"],
    )


# Against loops over the formulas


def probabilities(logits: Tensor, temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in logits.tolist()]
    return [power / sum(powers) for power in powers]


def divergence(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def unit(row: Sequence[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in row))
    return [value / length for value in row]


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    a, b = ([value - sum(row) / len(row) for value in row] for row in (a, b))
    return dot(unit(a), unit(b))


def smooth_l1(difference: float) -> float:
    size = abs(difference)
    return size * size / 2 if size < 1 else size - 0.5


def naive_kd(student: Tensor, teacher: Tensor) -> float:
    rows = [
        divergence(probabilities(t, 4.0), probabilities(s, 4.0))
        for s, t in zip(student, teacher, strict=True)
    ]
    return 16 * sum(rows) / len(rows)


def naive_logit_std(student: Tensor, teacher: Tensor) -> float:
    total = 0.0
    for pair in zip(student, teacher, strict=True):
        p_s, p_t = (probabilities(standardised(row.tolist()), 2.0) for row in pair)
        total += 4 * divergence(p_t, p_s)
    return total / len(student)


def standardised(row: list[float]) -> Tensor:
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in row) / (len(row) - 1))
    return torch.tensor([(value - mean) / deviation for value in row], dtype=torch.float64)


def naive_dkd(student: Tensor, teacher: Tensor) -> float:
    total = 0.0
    for s, t, target in zip(student, teacher, TARGETS.tolist(), strict=True):
        p_s, p_t = probabilities(s, 4.0), probabilities(t, 4.0)
        hit_s, hit_t = p_s.pop(target), p_t.pop(target)
        total += divergence([hit_t, 1 - hit_t], [hit_s, 1 - hit_s])
        total += 8 * divergence([p / (1 - hit_t) for p in p_t], [p / (1 - hit_s) for p in p_s])
    return 16 * total / len(student)


def naive_dist(student: Tensor, teacher: Tensor) -> float:
    p_s = [probabilities(row, 1.0) for row in student]
    p_t = [probabilities(row, 1.0) for row in teacher]
    between = [1 - correlation(s, t) for s, t in zip(p_s, p_t, strict=True)]
    within = [1 - correlation(s, t) for s, t in zip(zip(*p_s), zip(*p_t), strict=True)]
    return sum(between) / len(between) + sum(within) / len(within)


def naive_fitnet(student: Tensor, teacher: Tensor) -> float:
    squares = [(s - t) ** 2 for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist())]
    return sum(squares) / len(squares)


def naive_at(student: Tensor, teacher: Tensor) -> float:
    squares = []
    for s, t in zip(student, teacher, strict=True):
        where_s, where_t = (unit((maps**2).mean(0).flatten().tolist()) for maps in (s, t))
        squares += [(a - b) ** 2 for a, b in zip(where_s, where_t, strict=True)]
    return sum(squares) / len(squares)


def naive_sp(student: Tensor, teacher: Tensor) -> float:
    rows_s, rows_t = (
        [unit([dot(a, b) for b in samples]) for a in samples]
        for samples in (maps.flatten(1).tolist() for maps in (student, teacher))
    )
    pairs = list(product(range(len(student)), repeat=2))
    return sum((rows_s[i][j] - rows_t[i][j]) ** 2 for i, j in pairs) / len(pairs)


def naive_rkd(student: Tensor, teacher: Tensor) -> float:
    points = [maps.mean((2, 3)).tolist() for maps in (student, teacher)]
    images = range(len(student))
    distances = []
    for side in points:
        pairs = {(i, j): math.dist(side[i], side[j]) for i, j in product(images, repeat=2)}
        mean = sum(pairs.values()) / (len(images) * (len(images) - 1))
        distances.append({pair: distance / mean for pair, distance in pairs.items()})
    of_distance = [smooth_l1(distances[0][pair] - distances[1][pair]) for pair in distances[0]]

    def angle(side: list[list[float]], i: int, j: int, k: int) -> float:
        if i in (j, k):
            return 0.0
        to_j, to_k = ([a - b for a, b in zip(side[other], side[i])] for other in (j, k))
        return dot(unit(to_j), unit(to_k))

    of_angle = [
        smooth_l1(angle(points[0], *triple) - angle(points[1], *triple))
        for triple in product(images, repeat=3)
    ]
    return 25 * sum(of_distance) / len(of_distance) + 50 * sum(of_angle) / len(of_angle)


def naive_pkt(student: Tensor, teacher: Tensor) -> float:
    entries: list[float] = []
    rows = []
    for maps in (student, teacher):
        points = [unit(point) for point in maps.mean((2, 3)).tolist()]
        similarities = [[(dot(a, b) + 1) / 2 for b in points] for a in points]
        rows.append([[value / sum(row) for value in row] for row in similarities])
    for p_s, p_t in zip(*rows, strict=True):
        entries += [t * math.log((t + 1e-7) / (s + 1e-7)) for s, t in zip(p_s, p_t, strict=True)]
    return sum(entries) / len(entries)


def naive_ickd(student: Tensor, teacher: Tensor) -> float:
    total = 0.0
    for s, t in zip(student.flatten(2).tolist(), teacher.flatten(2).tolist(), strict=True):
        rows_s, rows_t = ([unit([dot(a, b) for b in maps]) for a in maps] for maps in (s, t))
        squares = [(a - b) ** 2 for x, y in zip(rows_s, rows_t) for a, b in zip(x, y)]
        total += sum(squares) / len(s)
    return total / len(student)


def naive_cwd(student: Tensor, teacher: Tensor) -> float:
    maps_s, maps_t = student.flatten(2).flatten(0, 1), teacher.flatten(2).flatten(0, 1)
    rows = [
        divergence(probabilities(t, 1.0), probabilities(s, 1.0))
        for s, t in zip(maps_s, maps_t, strict=True)
    ]
    return sum(rows) / len(rows)


def naive_pkd(student: Tensor, teacher: Tensor) -> float:
    channels_s, channels_t = (
        maps.transpose(0, 1).flatten(1).tolist() for maps in (student, teacher)
    )
    n = len(channels_s[0])
    rows = [1 - correlation(s, t) for s, t in zip(channels_s, channels_t, strict=True)]
    return (n - 1) / n * sum(rows) / len(rows)


def naive_masks(boxes: Tensor, height: int, width: int) -> tuple[list, list]:
    objects = [[0.0] * width for _ in range(height)]
    for x0, y0, x1, y1 in boxes.tolist():
        columns = range(math.floor(x0 * width / CANVAS), math.ceil(x1 * width / CANVAS) + 1)
        rows = range(math.floor(y0 * height / CANVAS), math.ceil(y1 * height / CANVAS) + 1)
        for row, column in product(rows, columns):
            if row < height and column < width:
                weight = 1 / (len(rows) * len(columns))
                objects[row][column] = max(objects[row][column], weight)
    empty = sum(value == 0 for row in objects for value in row)
    background = [[(value == 0) / max(empty, 1) for value in row] for row in objects]
    return objects, background


def naive_attention(maps: Tensor) -> tuple[list[float], list[float]]:
    """Return spatial and channel attention of one sample, of temperature 0.5."""
    channels, height, width = maps.shape
    spatial = probabilities(maps.abs().mean(0).flatten(), 0.5)
    channel = probabilities(maps.abs().mean((1, 2)), 0.5)
    return [height * width * value for value in spatial], [channels * value for value in channel]


def naive_fgd(student: Tensor, teacher: Tensor, weights: dict[str, float]) -> float:
    """Return FGD without its relation term."""
    _, channels, height, width = teacher.shape
    total = 0.0
    for s, t, boxes in zip(student, teacher, BOXES, strict=True):
        objects, background = naive_masks(boxes, height, width)
        (spatial_s, channel_s), (spatial_t, channel_t) = naive_attention(s), naive_attention(t)
        for c, y, x in product(range(channels), range(height), range(width)):
            error = spatial_t[y * width + x] * channel_t[c] * (s[c, y, x] - t[c, y, x]).item() ** 2
            total += weights["foreground"] * objects[y][x] * error
            total += weights["background"] * background[y][x] * error
        apart = [abs(a - b) for a, b in zip(spatial_s + channel_s, spatial_t + channel_t)]
        total += weights["attention"] * sum(apart)
    return total / len(student)


NAIVE: dict[str, Callable[[Tensor, Tensor], float]] = {
    "kd": naive_kd,
    "dkd": naive_dkd,
    "logit-std": naive_logit_std,
    "dist": naive_dist,
    "fitnet": naive_fitnet,
    "at": naive_at,
    "sp": naive_sp,
    "rkd": naive_rkd,
    "pkt": naive_pkt,
    "ickd": naive_ickd,
    "cwd": naive_cwd,
    "pkd": naive_pkd,
}


@pytest.mark.parametrize("name", NAIVE)
def test_loss_follows_its_formula(name: str):
    module, given = build(name), inputs()
    if baseline_class(name).reads == "logits":
        expected = NAIVE[name](given["student_logits"], given["teacher_logits"])
    else:
        expected = 0.0
        for level in baseline_class(name).levels_of(STUDENT):
            student, teacher = given["student_features"][level], given["teacher_features"][level]
            if name not in PAIRS:
                student, teacher = on_one_grid(student, teacher)
            if name in ADAPTED:
                student = module.adapters[str(level)](student).detach()
            expected += NAIVE[name](student, teacher)
    # those add small constants to what they divide by
    close = 1e-5 if name in ("pkt", "pkd", "logit-std") else 1e-9
    assert module(**given).item() == pytest.approx(expected, rel=close)


def test_vid_follows_its_formula():
    module, given = build("vid", levels=[1]), inputs()
    student = F.adaptive_avg_pool2d(given["student_features"][1], 3)
    regressor = module.regressors["1"]
    layers = [layer.weight[:, :, 0, 0] for layer in regressor.regressor if hasattr(layer, "weight")]
    first, second, third = layers
    terms = []
    for b, y, x in product(range(3), repeat=3):
        hidden = second @ (first @ student[b, :, y, x]).relu()
        mean = (third @ hidden.relu()).tolist()
        for c in range(6):
            variance = math.log(1 + math.exp(regressor.soft_plus_param[c].item())) + 1e-5
            error = mean[c] - given["teacher_features"][1][b, c, y, x].item()
            terms.append(0.5 * (error**2 / variance + math.log(variance)))
    assert module(**given).item() == pytest.approx(sum(terms) / len(terms), rel=1e-9)


@pytest.mark.parametrize("wanted", [2e-5, 5.0, 1e4])
def test_vid_starts_with_its_variance(wanted: float):
    shapes = {"student_shapes": STUDENT, "teacher_shapes": TEACHER}
    module = baseline_loss("vid", variance=wanted, **shapes)
    _, variance = module.regressors["1"](torch.zeros(1, 4, 1, 1))
    torch.testing.assert_close(variance, torch.full((1, 6, 1, 1), wanted))


@pytest.mark.parametrize("two_stage", [False, True])
def test_fgd_follows_its_formula(two_stage: bool):
    module, given = build("fgd", two_stage=two_stage), inputs()
    published = baseline_class("fgd").settings_for(two_stage=two_stage)
    expected = 0.0
    for level in STUDENT:
        student, teacher = on_one_grid(
            given["student_features"][level], given["teacher_features"][level]
        )
        student = module.adapters[str(level)](student).detach()
        expected += naive_fgd(student, teacher, published)
        related = [
            naive_context(block[str(level)], maps)
            for block, maps in (
                (module.student_context, student),
                (module.teacher_context, teacher),
            )
        ]
        expected += published["relation"] * (related[0] - related[1]).square().sum().item() / 3
    # the masks are float32
    assert module(**given).item() == pytest.approx(expected, rel=1e-7)


def naive_context(block: GlobalContext, maps: Tensor) -> Tensor:
    first, norm, _, last = block.transform
    results = []
    for sample in maps:
        look = torch.einsum("c,chw->hw", block.attention.weight[0, :, 0, 0], sample)
        weights = torch.tensor(probabilities(look.flatten(), 1.0), dtype=maps.dtype)
        context = sample.flatten(1) @ weights
        hidden = first.weight[:, :, 0, 0] @ context + first.bias
        hidden = (hidden - hidden.mean()) / (hidden.var(correction=0) + norm.eps).sqrt()
        hidden = (hidden * norm.weight.flatten() + norm.bias.flatten()).relu()
        added = last.weight[:, :, 0, 0] @ hidden + last.bias
        results.append(sample + added[:, None, None])
    return torch.stack(results)


# By hand


def logits_of(*p: float) -> Tensor:
    return torch.tensor([p], dtype=torch.float64).log()


def test_dkd_by_hand():
    student, teacher = logits_of(0.25, 0.5, 0.25), logits_of(0.5, 0.3, 0.2)
    of_target = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    of_others = 0.6 * math.log(0.6 / (2 / 3)) + 0.4 * math.log(0.4 / (1 / 3))
    target = torch.tensor([0])
    value = dkd_loss(student, teacher, target, 2.0, 3.0, 1.0)
    assert value.item() == pytest.approx(2 * of_target + 3 * of_others, rel=1e-12)


def test_kd_is_dkd_with_the_teachers_doubt_as_weight_of_the_others():
    student, teacher = random(1, 6), random(1, 6, seed=1)
    doubt = 1 - (teacher / 4).softmax(1)[0, 2].item()
    value = dkd_loss(student, teacher, torch.tensor([2]), 1.0, doubt, 4.0)
    torch.testing.assert_close(value, kd_loss(student, teacher, 4.0), rtol=1e-12, atol=0)


def test_dkd_is_finite_where_probabilities_round_to_0_and_1():
    student = torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True)
    for target in range(3):
        value = dkd_loss(
            student, torch.tensor([[-500.0, 0, 500]]), torch.tensor([target]), 1, 8, 1.0
        )
        (gradient,) = torch.autograd.grad(value, student)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_similarities_and_correlations_by_hand():
    apart = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)
    alike = torch.ones_like(apart)
    # the rows are (1, 0) and (0, 1) against (1, 1) / sqrt(2) twice: 2 - sqrt(2) for each
    images = sp_loss(alike[:, :, None], apart[:, :, None])
    assert images.item() == pytest.approx((2 - math.sqrt(2)) / 2, rel=1e-12)
    channels = ickd_loss(alike[None, :, 0, None], apart[None, :, 0, None])
    assert channels.item() == pytest.approx(2 - math.sqrt(2), rel=1e-12)


def test_attention_maps_by_hand():
    student = torch.tensor([[[3.0, 0.0]], [[0.0, 0.0]]], dtype=torch.float64)[None]
    teacher = torch.tensor([[[2.0, 2.0]]], dtype=torch.float64)[None]
    # (1, 0) against (1, 1) / sqrt(2)
    expected = ((1 - math.sqrt(0.5)) ** 2 + 0.5) / 2
    assert at_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_likelihood_by_hand():
    mean = torch.tensor([1.0, 4.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    variance = torch.tensor([0.5, 2.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    expected = ((4 / 0.5 + math.log(0.5)) + (1 / 2 + math.log(2))) / 4
    value = vid_loss(mean, variance, torch.full_like(mean, 3.0))
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_distances_and_angles_by_hand():
    # sides of 3, 4 and 5, against those of an equilateral triangle
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    teacher = torch.tensor([[0, 0], [2, 0], [1, math.sqrt(3)]], dtype=torch.float64)
    sides = [0.5 * (side / 4 - 1) ** 2 for side in (3, 4, 5)]
    cosines = [0.5 * (cosine - 0.5) ** 2 for cosine in (0, 0.6, 0.8)]
    apart = rkd_loss(student, teacher, 3.0, 0.0)
    assert apart.item() == pytest.approx(3 * 2 * sum(sides) / 9, rel=1e-12)
    turned = rkd_loss(student, teacher, 0.0, 5.0)
    assert turned.item() == pytest.approx(5 * 2 * sum(cosines) / 27, rel=1e-12)
    both = rkd_loss(student, teacher, 3.0, 5.0)
    torch.testing.assert_close(both, apart + turned)


def test_neighbours_by_hand():
    student = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    teacher = torch.tensor([[3.0], [1.0]], dtype=torch.float64)
    # (2/3, 1/3) against (1/2, 1/2)
    expected = 0.25 * (math.log(0.5 / (2 / 3)) + math.log(0.5 / (1 / 3)))
    assert pkt_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_correlations_of_classes_by_hand():
    student, teacher = logits_of(0.6, 0.3, 0.1), logits_of(0.5, 0.5, 1e-9)
    # the student's less 1/3: (8, -1, -7) / 30; the teacher's: (1, 1, -2) / 6
    correlation = (8 - 1 + 14) / math.sqrt(114 * 6)
    value = dist_loss(student, teacher, 3.0, 0.0, 1.0)
    assert value.item() == pytest.approx(3 * (1 - correlation), rel=1e-7)
    # nothing correlates within the classes of one image
    assert dist_loss(student, teacher, 0.0, 2.0, 1.0).item() == 2.0


def test_standardised_logits_by_hand():
    student, teacher = torch.tensor([[[1.0, 3.0]], [[9.0, -1.0]]], dtype=torch.float64)
    # two classes are always at plus and minus 1 / sqrt(2)
    p = 1 / (1 + math.exp(-1 / math.sqrt(2)))
    expected = 4 * (2 * p - 1) * math.log(p / (1 - p))
    value = standardised_kd_loss(student, teacher, 2.0)
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_logit_std_does_not_see_scale_and_shift():
    student, teacher = random(3, 6), random(3, 6, seed=1)
    value = standardised_kd_loss(student, teacher, 2.0)
    other = standardised_kd_loss(5 * student - 3, 0.1 * teacher + 7, 2.0)
    torch.testing.assert_close(other, value, rtol=1e-5, atol=0)


def test_cwd_by_hand():
    teacher = 2 * torch.tensor([0.75, 0.25], dtype=torch.float64).log().reshape(1, 1, 1, 2)
    value = cwd_loss(torch.ones_like(teacher), teacher, 2.0)
    assert value.item() == pytest.approx(4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))


def test_pkd_by_hand_does_not_see_scale_and_shift():
    student = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).reshape(1, 1, 1, 3)
    assert pkd_loss(student, 2 * student + 5).item() == pytest.approx(0, abs=1e-11)
    # opposite: (3 - 1) / 3 times 1 - (-1)
    assert pkd_loss(student, -student).item() == pytest.approx(4 / 3, rel=1e-5)


def test_focal_masks_by_hand():
    boxes = [torch.tensor([[20.0, 20.0, 44.0, 28.0]]), torch.zeros(0, 4)]
    objects, background = focal_masks(boxes, 64, (4, 4))
    # across from floor(1.25) to ceil(2.75), down from floor(1.25) to ceil(1.75): 3 x 2 cells
    expected = torch.zeros(4, 4)
    expected[1:3, 1:4] = 1 / 6
    torch.testing.assert_close(objects[0], expected)
    torch.testing.assert_close(background[0], (expected == 0) / 10)
    assert torch.equal(objects[1], torch.zeros(4, 4))
    torch.testing.assert_close(background[1], torch.full((4, 4), 1 / 16))


def test_focal_masks_take_the_largest_weight_and_leave_no_background_of_full_images():
    large, small = [0.0, 0.0, 64.0, 64.0], [0.0, 0.0, 16.0, 16.0]
    objects, background = focal_masks([torch.tensor([large, small])], 64, (4, 4))
    # from 0 to 4, of which the last lies beyond; from 0 to 1
    assert objects[0, 0, 0].item() == pytest.approx(1 / 4)
    assert objects[0, 3, 3].item() == pytest.approx(1 / 25)
    assert (background == 0).all()


def test_focal_masks_know_width_from_height():
    objects, _ = focal_masks([torch.tensor([[40.0, 1.0, 44.0, 30.0]])], 64, (2, 4))
    # across from floor(2.5) to ceil(2.75), down from floor(0.03) to ceil(0.94)
    assert objects[0].tolist() == [[0, 0, 0.25, 0.25], [0, 0, 0.25, 0.25]]


# Adapters


def test_adapters_are_the_published_ones():
    shapes = {"student_shapes": {1: (4, 3, 3)}, "teacher_shapes": {1: (6, 3, 3)}}
    maps = random(5, 4, 3, 3, dtype=torch.float32)
    weight = random(6, 4, 1, 1, seed=1, dtype=torch.float32)

    def adapted(name: str) -> Tensor:
        module = baseline_loss(name, canvas=CANVAS, **shapes)
        for layer in module.adapters.modules():
            if isinstance(layer, nn.Conv2d):
                assert layer.kernel_size == (1, 1)
                assert (layer.bias is not None) == (name == "fgd")
                layer.weight.data.copy_(weight)
                if layer.bias is not None:
                    layer.bias.data.fill_(1.0)
        return module.adapters["1"](maps)

    plain = F.conv2d(maps, weight)
    variance, mean = torch.var_mean(plain, (0, 2, 3), correction=0, keepdim=True)
    normalised = (plain - mean) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(adapted("ickd"), normalised)
    torch.testing.assert_close(adapted("fitnet"), normalised.relu())
    torch.testing.assert_close(adapted("fgd"), plain + 1)
    torch.testing.assert_close(adapted("cwd"), plain)
    torch.testing.assert_close(adapted("pkd"), plain)


@pytest.mark.parametrize("name", ["fgd", "cwd", "pkd"])
def test_pyramids_of_one_width_are_not_adapted(name: str):
    module = build(name, student_shapes=TEACHER)
    maps = random(1, 6, 3, 3)
    assert module.adapters["1"](maps) is maps


# What holds for all


# the scale of crd is a constant of each batch: test_rivals.py
@pytest.mark.parametrize("name", [name for name in NAMES if name != "crd"])
def test_loss_passes_gradcheck(name: str):
    shapes = {"student_shapes": {1: (3, 3, 3)}, "teacher_shapes": {1: (4, 2, 2)}}
    module = build(name, **shapes)
    given = inputs()
    given["teacher_features"] = features(shapes["teacher_shapes"], 20)

    def loss(logits: Tensor, maps: Tensor) -> Tensor:
        return module(**(given | {"student_logits": logits, "student_features": {1: maps}}))

    student = (given["student_logits"].requires_grad_(), random(3, 3, 3, 3).requires_grad_())
    assert gradcheck(loss, student)


@each_name
def test_gradient_reaches_student_and_adapters_and_never_the_teacher(name: str):
    module, given = build(name), inputs()
    for tensor in (*tensors_of(given, "student"), *tensors_of(given, "teacher")):
        tensor.requires_grad_()
    module(**given).backward()
    assert all(tensor.grad is None for tensor in tensors_of(given, "teacher"))
    entry = baseline_class(name)
    if entry.reads == "logits":
        read = [given["student_logits"]]
    else:
        read = [given["student_features"][level] for level in entry.levels_of(STUDENT)]
    for tensor in tensors_of(given, "student"):
        is_read = any(tensor is other for other in read)
        assert (tensor.grad is not None and tensor.grad.abs().max() > 0) == is_read
    assert bool(list(module.parameters())) == (name in ADAPTED)
    for parameter_name, parameter in module.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 1e-12, parameter_name


@each_name
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_under_autocast_equals_float32(name: str, dtype: torch.dtype):
    module, given = build(name).float(), inputs(dtype)
    student = [tensor.requires_grad_() for tensor in tensors_of(given, "student")]
    whole = {side: {k: maps.float() for k, maps in given[side].items()} for side in FEATURE_KEYS}
    whole |= {side: given[side].float() for side in ("student_logits", "teacher_logits")}
    expected = module(**(given | whole))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = module(**given)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert torch.equal(value, expected)
    assert all(tensor.grad is None or tensor.grad.isfinite().all() for tensor in student)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SHAPED])
def test_loss_of_a_student_like_the_teacher_is_zero(name: str):
    given = inputs()
    given["student_logits"] = given["teacher_logits"]
    given["student_features"] = given["teacher_features"]
    assert abs(baseline_loss(name)(**given).item()) < 1e-10
    assert baseline_loss(name)(**(given | {"student_logits": random(3, 6)})) >= 0


def test_fgd_of_a_student_like_the_teacher_starts_at_zero():
    module = baseline_loss("fgd", student_shapes=TEACHER, teacher_shapes=TEACHER, canvas=CANVAS)
    given = inputs(torch.float32)
    assert module(**(given | {"student_features": given["teacher_features"]})).item() == 0
    assert module(**(given | {"student_features": features(TEACHER, 30, torch.float32)})) > 0


def degenerate(maps: Tensor) -> list[Tensor]:
    """Return maps with dead channels, of constant channels, of alike images, and of zeros."""
    dead = maps.clone()
    dead[:, 1] = 0.0
    silent = maps.clone()
    silent[0] = 0.0
    constant = maps.mean((2, 3), keepdim=True).expand_as(maps).clone()
    alike = maps[:1].expand_as(maps).clone()
    return [maps, dead, silent, constant, alike, torch.zeros_like(maps)]


@pytest.mark.parametrize(
    ("name", "adapted"),
    [(name, True) for name in FEATURES]
    + [(name, False) for name in FEATURES if name not in SHAPED],
)
@pytest.mark.parametrize("size", [1, 3])
def test_value_and_gradient_are_finite_on_degenerate_maps(name: str, adapted: bool, size: int):
    shapes = {1: (6, size, size)}
    context = {"student_shapes": shapes, "teacher_shapes": shapes} if adapted else {}
    module = baseline_loss(name, canvas=CANVAS, **context)
    maps = random(3, 6, size, size, dtype=torch.float32)
    other = random(3, 6, size, size, seed=1, dtype=torch.float32)
    for student, teacher in product(degenerate(maps), degenerate(other)):
        student.requires_grad_()
        maps_of_both = {"student_features": {1: student}, "teacher_features": {1: teacher}}
        value = module(**maps_of_both, boxes=BOXES, targets=TARGETS)
        (gradient,) = torch.autograd.grad(value, student)
        assert value.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["sp", "ickd"])
def test_what_is_zero_gets_no_exploding_gradient(name: str):
    student, teacher = random(3, 6, 3, 3, dtype=torch.float32), random(3, 6, 3, 3, seed=1)
    if name == "sp":
        student[0] = 0
    else:
        student[:, 0] = 0
    student.requires_grad_()
    loss = baseline_loss(name)(student_features={1: student}, teacher_features={1: teacher.float()})
    loss.backward()
    assert 0 < student.grad.abs().max() < 10


def test_alike_images_have_the_same_place_and_no_exploding_gradient():
    student, teacher = random(4, 5, dtype=torch.float32), random(4, 5, seed=1, dtype=torch.float32)
    student[1] = student[0]
    student.requires_grad_()
    rkd_loss(student, teacher, 25.0, 50.0).backward()
    assert 0 < student.grad.abs().max() < 100


def test_a_silent_image_is_like_torchdistills_and_has_no_gradient_in_pkt():
    student, teacher = random(4, 5), random(4, 5, seed=1)
    student[0] = teacher[2] = 0.0
    expected = compared_by_torchdistill("pkt", student, teacher)
    student.requires_grad_()
    value = pkt_loss(student, teacher)
    value.backward()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert torch.equal(student.grad[0], torch.zeros_like(student.grad[0]))
    assert student.grad[1:].abs().max() > 0


def test_opposite_images_are_finite_in_pkt():
    """By rounding their cosine is less than -1."""
    for seed in range(20):
        point = random(1, 300, seed=seed, dtype=torch.float32)
        student = torch.cat([point, -point]).requires_grad_()
        value = pkt_loss(student, random(2, 4, dtype=torch.float32))
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("alike", ["student", "teacher", "both"])
@pytest.mark.parametrize("level", [0.0, 3.3, -1e4])
def test_equal_logits_give_a_small_gradient(name: str, alike: str, level: float):
    given = inputs(torch.float32)
    for side in ("student", "teacher"):
        if alike in (side, "both"):
            given[f"{side}_logits"] = torch.full((3, 6), level)
    student = given["student_logits"].requires_grad_()
    value = build(name).float()(**given)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite()
    assert gradient.abs().max() < 10
    assert value < 50


@pytest.mark.parametrize("name", NAMES)
def test_one_image_is_enough_or_refused_in_one_line(name: str):
    module = build(name)
    given = {
        key: {k: maps[:1] for k, maps in value.items()} if isinstance(value, dict) else value[:1]
        for key, value in inputs().items()
    }
    given |= {f"{side}_proxies": inputs()[f"{side}_proxies"] for side in SIDES}
    if name in (*PAIRS, "reviewkd"):
        with pytest.raises(ConfigError, match=r"needs at least 2\b.*; got 1$"):
            module(**given)
        return
    for tensor in tensors_of(given, "student"):
        tensor.requires_grad_()
    value = module(**given)
    value.backward()
    assert value.isfinite()
    assert all(t.grad is None or t.grad.isfinite().all() for t in tensors_of(given, "student"))


@pytest.mark.parametrize("name", ["fitnet", "ickd"])
def test_batch_normalisation_of_one_value_is_refused_in_training_only(name: str):
    shapes = {1: (6, 1, 1)}
    module = baseline_loss(name, student_shapes=shapes, teacher_shapes=shapes)
    maps = {1: torch.ones(1, 6, 1, 1)}
    with pytest.raises(ConfigError, match="at least 2 images in a batch; got 1"):
        module(student_features=maps, teacher_features=maps)
    assert module.eval()(student_features=maps, teacher_features=maps).isfinite()


@pytest.mark.parametrize("loss", [pkd_loss, lambda s, t: cwd_loss(s, t, 1.0)], ids=["pkd", "cwd"])
def test_one_position_of_one_image_says_nothing(loss: Callable[[Tensor, Tensor], Tensor]):
    student = random(1, 6, 1, 1).requires_grad_()
    value = loss(student, random(1, 6, 1, 1, seed=1))
    value.backward()
    assert value == 0
    assert (student.grad == 0).all()


# Levels


# a review compares levels with each other, and a mask is drawn for one level after the other
@pytest.mark.parametrize("name", [name for name in FEATURES if name not in ("reviewkd", "mgd")])
def test_default_levels_are_the_published_ones(name: str):
    entry, given = baseline_class(name), inputs()
    levels = entry.levels_of([3, 1, 2])
    assert levels == {"all": (1, 2, 3), "middle": (2,), "last": (3,)}[entry.levels]
    several, one_by_one = build(name), [build(name, levels=[level]) for level in levels]
    state = several.state_dict()
    for module in one_by_one:
        module.load_state_dict({key: state[key] for key in module.state_dict()})
    expected = sum(module(**given) for module in one_by_one)
    torch.testing.assert_close(several(**given), expected)


def test_the_middle_of_an_even_number_is_the_shallower():
    assert baseline_class("fitnet").levels_of([4, 2, 3, 1]) == (2,)
    assert baseline_class("kd").levels_of([1, 2]) == ()


def test_without_shapes_the_levels_are_those_that_both_have():
    maps = random(3, 4, 2, 2)
    value = baseline_loss("at")(
        student_features={1: maps, 2: maps}, teacher_features={2: maps * 2, 3: maps}
    )
    assert value.item() == pytest.approx(0, abs=1e-12)
    with pytest.raises(ConfigError, match=r"^at: student and teacher share no level$"):
        baseline_loss("at")(student_features={1: maps}, teacher_features={2: maps})


# What is published


@pytest.mark.parametrize(
    ("name", "weight", "task_weight"),
    [
        ("kd", 0.9, 0.1),
        ("dkd", 1, 1),
        ("fitnet", 100, 1),
        ("at", 1000, 1),
        ("sp", 3000, 1),
        ("rkd", 1, 1),
        ("pkt", 30000, 1),
        ("vid", 1, 1),
        ("dist", 1, 1),
        ("logit-std", 9, 0.1),
        ("ickd", 2.5, 1),
        ("fgd", 1, 1),
        ("cwd", 10, 1),
        ("pkd", 10, 1),
        ("crd", 0.8, 1),
        ("reviewkd", 1, 1),
        ("mgd", 2e-5, 1),
        ("dense", 1, 1),
        ("trg", 1, 1),
        ("prg", 1, 0),
        ("vrm", 1, 1),
        ("graph-metrics", 1, 1),
    ],
)
def test_published_weights(name: str, weight: float, task_weight: float):
    entry = baseline_class(name)
    assert (entry.weight_for(two_stage=False), entry.task_weight) == (weight, task_weight)
    assert build(name).weight == weight
    assert entry.task == ("detection" if name in ("fgd", "cwd", "pkd", "mgd") else "classification")
    assert entry.ramp == (1 / 12 if name in ("dkd", "reviewkd") else 0)
    assert "\n" not in entry.source


def test_two_stage_detectors_have_weights_of_their_own():
    assert build("pkd", two_stage=True).weight == 6
    assert build("cwd", two_stage=True).weight == 10
    mgd = build("mgd", two_stage=True)
    assert (mgd.weight, mgd.masked) == (5e-7, 0.45)
    fgd = build("fgd", two_stage=True)
    assert fgd.weights == {
        "foreground": 5e-5,
        "background": 2.5e-5,
        "attention": 5e-5,
        "relation": 5e-7,
    }
    assert fgd.temperature == 0.5
    assert build("fgd", two_stage=True, relation=1.0).weights["relation"] == 1.0


def test_settings_replace_the_published_ones():
    given = inputs()
    assert build("rkd", distance=0.0)(**given) < build("rkd")(**given)
    student, teacher = given["student_logits"], given["teacher_logits"]
    expected = dkd_loss(student, teacher, TARGETS, 2.0, 3.0, 1.5)
    value = build("dkd", alpha=2.0, beta=3.0, temperature=1.5)(**given)
    torch.testing.assert_close(value, expected)


# Wrong inputs


def test_unknown_names_and_settings_are_refused_with_the_allowed_ones():
    with pytest.raises(ConfigError, match=r"unknown baseline 'fitnets'; did you mean 'fitnet'"):
        baseline_loss("fitnets")
    with pytest.raises(
        ConfigError,
        match=r"^dkd has no setting 'bta'; did you mean 'beta'\? "
        r"\(allowed: alpha, beta, temperature\)$",
    ):
        baseline_loss("dkd", bta=1.0)
    with pytest.raises(ConfigError, match=r"^at has no setting 'p' \(allowed: none\)$"):
        baseline_loss("at", p=2.0)


@each_name
def test_what_is_missing_is_named(name: str):
    module, given = build(name), inputs()
    reads = baseline_class(name).reads
    needed = {f"student_{reads}", f"teacher_{reads}"}
    needed |= {"dkd": {"targets"}, "crd": {"targets"}, "fgd": {"boxes"}}.get(name, set())
    if name == "prg":
        needed |= {f"{side}_{of}" for side in SIDES for of in ("embeddings", "proxies")}
    assert set(module.needs) == needed
    for keyword in needed:
        with pytest.raises(ConfigError, match=f"^{name} needs {keyword}$"):
            module(**(given | {keyword: None}))
    assert module(**{keyword: given[keyword] for keyword in needed}).isfinite()


@pytest.mark.parametrize("name", ["fitnet", "ickd", "cwd", "pkd"])
def test_other_channels_without_shapes_are_refused(name: str):
    with pytest.raises(
        ConfigError,
        match=(
            f"^{name}: level 1 has 4 channels in the student and 6 in the teacher; pass "
            "student_shapes and teacher_shapes"
        ),
    ):
        baseline_loss(name, levels=[1])(**inputs())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vid", {"student_shapes": None, "teacher_shapes": None}, "^vid needs student_shapes and"),
        ("fgd", {"student_shapes": None, "teacher_shapes": None}, "^fgd needs student_shapes and"),
        ("fgd", {"canvas": None}, "^fgd needs canvas, the side of the images in pixels$"),
        ("at", {"teacher_shapes": {1: (6, 3, 3)}}, r"the same levels; got \[1, 2, 3\] and \[1\]"),
        ("at", {"levels": [4, 1]}, r"^at: no features of level 4 \(available: 1, 2, 3\)$"),
        ("at", {"levels": []}, "^at: no levels; choose at least one$"),
        ("kd", {"temperature": 0.0}, "temperature must be a finite number above 0; got 0.0"),
        ("cwd", {"tau": -1.0}, "tau must be a finite number above 0; got -1.0"),
        ("dist", {"tau": math.nan}, "tau must be a finite number above 0; got nan"),
        ("dkd", {"alpha": -1.0}, "alpha must be a finite number, 0 or above; got -1.0"),
        ("rkd", {"distance": 0.0, "angle": 0.0}, "distance, angle are all 0"),
        ("fgd", {"relation": math.inf}, "relation must be a finite number, 0 or above; got inf"),
        ("vid", {"floor": 6.0}, "^vid: variance must be above floor, .* got 5.0 and 6.0$"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(name: str, changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message) as raised:
        build(name, **changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "loss",
    [
        *(hint_loss, ickd_loss, pkd_loss, lambda s, t: cwd_loss(s, t, 1.0)),
        lambda s, t: vid_loss(s, torch.ones(1, 5, 1, 1), t),
    ],
    ids=["hint", "ickd", "pkd", "cwd", "vid"],
)
def test_different_shapes_are_refused_with_both(loss: Callable[[Tensor, Tensor], Tensor]):
    with pytest.raises(ConfigError, match=r"got \(2, 5, 3, 3\) and \(2, 6, 3, 3\)"):
        loss(random(2, 5, 3, 3), random(2, 6, 3, 3))


def test_other_grids_are_refused_in_attention_maps():
    with pytest.raises(ConfigError, match=r"attention maps .* got \(2, 3, 3\) and \(2, 3, 4\)"):
        at_loss(random(2, 5, 3, 3), random(2, 6, 3, 4))


@pytest.mark.parametrize(
    "loss", [lambda s, t: rkd_loss(s, t, 1.0, 1.0), pkt_loss], ids=["rkd", "pkt"]
)
@pytest.mark.parametrize(
    ("student", "teacher"), [((1, 5), (1, 6)), ((3, 5), (4, 5)), ((3, 5, 1), (3, 5))]
)
def test_what_is_not_embeddings_is_refused(
    loss: Callable[[Tensor, Tensor], Tensor], student: tuple[int, ...], teacher: tuple[int, ...]
):
    with pytest.raises(ConfigError, match=r"^embeddings must be \(B, C\)") as raised:
        loss(torch.ones(student), torch.ones(teacher))
    assert str(raised.value).endswith(f"got {student} and {teacher}")


@pytest.mark.parametrize("name", LOGITS)
def test_other_classes_are_refused(name: str):
    with pytest.raises(ConfigError, match=r"logits .* got \(3, 6\) and \(3, 7\)"):
        build(name)(**(inputs() | {"teacher_logits": random(3, 7)}))


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("shape", [(3, 6, 4), (6,), (0, 6), (3, 0)])
def test_what_is_not_logits_is_refused(name: str, shape: tuple[int, ...]):
    message = rf"^logits must have two dimensions \(B, K\).*; got {re.escape(str(shape))}$"
    logits = {"student_logits": torch.zeros(shape), "teacher_logits": torch.zeros(shape)}
    with pytest.raises(ConfigError, match=message):
        build(name)(**(inputs() | logits))


@pytest.mark.parametrize("name", ["dkd", "logit-std", "vrm"])
def test_one_class_is_refused(name: str):
    logits = {"student_logits": torch.zeros(3, 1), "teacher_logits": torch.zeros(3, 1)}
    targets = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"K at least 2; got \(3, 1\)$"):
        build(name)(**logits, targets=targets)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((3, 6, 6), (3, 3, 3)),
        ((3, 4, 6, 6), (3, 3, 3)),
        ((0, 4, 6, 6), (0, 6, 3, 3)),
        ((3, 4, 0, 6), (3, 6, 3, 3)),
        ((2, 4, 6, 6), (3, 6, 3, 3)),
    ],
)
def test_wrong_maps_are_refused_with_level_and_shapes(
    name: str, student: tuple[int, ...], teacher: tuple[int, ...]
):
    module, given = build(name, levels=[1]), inputs()
    maps = {"student_features": {1: torch.zeros(student)}}
    maps["teacher_features"] = {1: torch.zeros(teacher)}
    message = f"{name}: the feature maps of level 1 must be .*; got {student} and {teacher}"
    with pytest.raises(ConfigError) as raised:
        module(**(given | maps))
    assert re.fullmatch(message.replace("(", r"\(").replace(")", r"\)"), str(raised.value))


@pytest.mark.parametrize("side", FEATURE_KEYS)
def test_a_missing_level_is_named(side: str):
    given = inputs()
    del given[side][3]
    with pytest.raises(ConfigError, match=r"^at: no features of level 3 \(available: 1, 2\)$"):
        build("at")(**given)


@each_name
def test_a_teacher_of_inference_mode_gives_the_same_gradients(name: str):
    module, given = build(name), inputs()
    of = [tensor.requires_grad_() for tensor in tensors_of(given, "student")]
    of += module.parameters()
    expected = with_gradients(module(**given), of)
    with torch.inference_mode():
        held = {
            "teacher_logits": given["teacher_logits"].clone(),
            "teacher_features": {k: maps.clone() for k, maps in given["teacher_features"].items()},
        }
    assert held["teacher_logits"].is_inference()
    torch.testing.assert_close(with_gradients(module(**(given | held)), of), expected)


def test_hint_loss_takes_a_teacher_of_inference_mode():
    student = random(2, 3, 2, 2).requires_grad_()
    with torch.inference_mode():
        teacher = random(2, 3, 2, 2, seed=1)
    hint_loss(student, teacher).backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher.clone()) / 12)


@each_name
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_nan_stays_one(name: str, side: str):
    given = inputs()
    given[f"{side}_logits"][1, 2] = math.nan
    for maps in given[f"{side}_features"].values():
        maps[1, 2] = math.nan
    assert build(name)(**given).isnan()


def test_attention_and_focal_losses_give_the_teacher_no_gradient():
    student, teacher = random(2, 5, 3, 3).requires_grad_(), random(2, 5, 3, 3, seed=1)
    teacher.requires_grad_()
    value = attention_loss(student, teacher, 0.5)
    (value + focal_loss(student, teacher, torch.ones(2, 3, 3), 0.5)).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0
