"""What makes the graph losses fast gives what the plain way does: values and gradients.

Shape letters: B batch, C channels, H height, W width, N = H * W positions, T terms.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from raygkd.accelerated import FAST
from raygkd.graph import ATTENTION_MODES, PLAIN, WEIGHTS, Operators
from raygkd.losses import ADAPTERS, SPECTRAL_MODES, GraphDistillationLoss
from raygkd.losses.level_terms import LevelMaps

# more channels than positions, fewer, and a single position
STUDENT = {1: (4, 6, 6), 2: (8, 2, 2), 3: (3, 1, 1)}
TEACHER = {1: (6, 3, 3), 2: (9, 4, 4), 3: (5, 1, 1)}
BOXES = [torch.tensor([[4.0, 4.0, 20.0, 30.0]])] * 5
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def maps(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, dtype=torch.float64, generator=generator) + 0.01


def features(
    shapes: Mapping[int, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float64
) -> dict[int, Tensor]:
    return {level: maps(5, *shape, seed=seed).to(dtype) for level, shape in shapes.items()}


def symmetric(matrix_BPP: Tensor) -> Tensor:
    return (matrix_BPP + matrix_BPP.mT) / 2


Operation = Callable[[Operators, Tensor], Tensor]
OPERATIONS: dict[str, Operation] = {
    "unit_rows": lambda operators, x: operators.unit_rows(x),
    "gram": lambda operators, x: operators.gram(x),
    "gram_times": lambda operators, x: operators.gram_times(x[:, :, :2].mT, x),
    "mean": lambda operators, x: operators.covariance(x)[0],
    "covariance": lambda operators, x: operators.covariance(x)[1],
    "squared_errors": lambda operators, x: operators.squared_errors(
        x, maps(*x.shape, seed=3), maps(2, x.shape[2], 1)
    )[0],
    "deflated_factor": lambda operators, x: operators.deflated_factor(x, 1),
    "deflated_factor without ones": lambda operators, x: operators.deflated_factor(x, 0),
    "deflated_adjacency": lambda operators, x: symmetric(operators.deflated_adjacency(x @ x.mT, 1)),
    "leading_pairs": lambda operators, x: operators.leading_pairs(x @ x.mT, 2)[1].square(),
}
each_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())


def value_and_gradient(function: Callable[[Tensor], Tensor], inputs: Tensor) -> list[Tensor]:
    inputs = inputs.clone().requires_grad_()
    value = function(inputs)
    probe = torch.cos(torch.arange(value.numel(), dtype=value.dtype)).view_as(value)
    return [value.detach(), *torch.autograd.grad((value * probe).sum(), inputs)]


@each_operation
def test_fast_operators_are_the_plain_ones_in_value_and_gradient(operation: Operation):
    for shape in ((2, 6, 4), (2, 4, 6)):
        found, wanted = (
            value_and_gradient(lambda x, which=which: operation(which, x), maps(*shape))
            for which in (FAST, PLAIN)
        )
        assert wanted[1].abs().max() > 1e-3
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@each_operation
def test_fast_operators_pass_gradcheck(operation: Operation):
    assert gradcheck(lambda x: operation(FAST, x), maps(2, 3, 4).requires_grad_())


def test_every_fast_operator_is_tested():
    methods = {name for name in vars(type(FAST)) if not name.startswith("_")}
    assert methods == {name for name in vars(Operators) if not name.startswith("_")}
    assert methods <= OPERATIONS.keys()


LOSSES: dict[str, Callable[[LevelMaps], Tensor]] = {"vertex": lambda pair: pair.vertex()}
for attention in ATTENTION_MODES:
    LOSSES[f"edge-{attention}"] = lambda pair, attention=attention: pair.edge(attention)
for mode, weights in itertools.product(SPECTRAL_MODES, WEIGHTS):
    LOSSES[f"{mode}-{weights}"] = lambda pair, mode=mode, weights=weights: pair.spectral(
        2, mode, weights
    )


def unusual_maps(channels: int, side: int) -> list[Tensor]:
    """Return maps with dead, faint, alike and constant channels, and none at all."""
    dead, faint, alike, constant = (maps(2, channels, side, side) for _ in range(4))
    dead[:, 1] = 0.0
    faint[:, 1] *= 1e-16
    alike[:, 1:] = alike[:, :1]
    constant[:, 1:] = 0.5
    return [maps(2, channels, side, side), dead, faint, alike, constant, torch.zeros_like(dead)]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("shape", [(9, 2), (4, 3)], ids=["C>N", "C<N"])
def test_losses_of_unusual_maps_are_the_plain_ones(
    loss: Callable[[LevelMaps], Tensor], shape: tuple[int, int]
):
    for student, teacher in itertools.product(unusual_maps(*shape), repeat=2):
        found, wanted = (
            value_and_gradient(
                lambda x, which=which, teacher=teacher: loss(LevelMaps(x, teacher, 0.5, which)),
                student,
            )
            for which in (FAST, PLAIN)
        )
        for one, other in zip(found, wanted, strict=True):
            assert one.isfinite().all()
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def a_loss(**settings: Any) -> GraphDistillationLoss:
    settings = {"alpha": 1.0, "beta": 2.0, "gamma": 3.0, "adapter": "normalised"} | settings
    student = settings.pop("student", STUDENT)
    return GraphDistillationLoss(student, TEACHER, temperature=0.5, dim=3, **settings)


def plain_and_fast(**settings: Any) -> list[GraphDistillationLoss]:
    """Return two losses with the same adapters, which are not those that they begin with."""
    torch.manual_seed(0)
    pair = [a_loss(accelerated=accelerated, **settings).double() for accelerated in (False, True)]
    with torch.no_grad():
        for one, other in zip(*(loss.parameters() for loss in pair), strict=True):
            one.add_(torch.rand_like(one))
            other.copy_(one)
    return pair


def outcome(loss: GraphDistillationLoss, at_once: bool, boxes: list[Tensor] | None) -> list[Tensor]:
    """Return terms, gradients of their weighted sum, and buffers."""
    students = {level: one.requires_grad_() for level, one in features(STUDENT, 1).items()}
    teachers = features(TEACHER, 2)
    take = loss.terms_with_gradient if at_once else loss
    terms = take(students, teachers, boxes)
    assert len(teachers) == (0 if at_once else 3)
    total = sum(loss.term_weights[name] * term for name, term in terms.items())
    inputs = [*students.values(), *(one for one in loss.parameters() if one.requires_grad)]
    found = torch.autograd.grad(total, inputs)
    return [*(term.detach() for term in terms.values()), *found, *loss.buffers()]


FORMS = [
    *({"mode": m, "weights": w} for m, w in itertools.product(SPECTRAL_MODES, WEIGHTS)),
    *({"adapter": a, "centre": c} for a, c in itertools.product(ADAPTERS, (False, True))),
    *({"graphs": "batch", "adapter": a} for a in ADAPTERS),
    {"attention": "softmax"},
    {"foreground": 0.5, "canvas": 48},
    {"alpha": 0.0, "gamma": 0.0},
    {"graphs": "batch", "alpha": 0.0},
]


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_terms_and_gradients_are_those_of_the_plain_way(
    form: dict[str, Any], at_once: bool, monkeypatch: pytest.MonkeyPatch
):
    # parts of a sample or two
    monkeypatch.setattr("raygkd.accelerated.parts.PART_BYTES", 1000)
    plain, fast = plain_and_fast(**form)
    boxes = BOXES if "foreground" in form else None
    for one, other in zip(
        outcome(fast, at_once, boxes), outcome(plain, at_once, boxes), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


def test_the_plain_way_has_no_machinery(monkeypatch: pytest.MonkeyPatch):
    plain, fast = plain_and_fast()
    for name in [name for name in vars(type(FAST)) if not name.startswith("_")]:
        monkeypatch.setattr(type(FAST), name, None)
    outcome(copy.deepcopy(plain), True, None)
    assert plain.held_bytes == 0
    with pytest.raises(TypeError, match="not callable"):
        outcome(fast, True, None)


def test_any_sum_of_plain_terms_has_its_gradients_as_often_as_wanted():
    plain, _ = plain_and_fast()
    students = {level: one.requires_grad_() for level, one in features(STUDENT, 1).items()}
    terms = plain.terms_with_gradient(students, features(TEACHER, 2))
    for name, term in terms.items():
        for _ in range(2):
            found = torch.autograd.grad(term, [*students.values()], retain_graph=True)
            # a single position has no variance within an image, but over a batch
            assert all(one.abs().max() > 0 for one in found[:2]), name


@pytest.mark.parametrize("graphs", ["image", "batch"])
def test_the_plain_way_has_second_derivatives(graphs: str):
    plain, _ = plain_and_fast(graphs=graphs)
    plain.eval()
    students, teachers = features(STUDENT, 1), features(TEACHER, 2)

    def total(first_BCHW: Tensor) -> Tensor:
        terms = plain({**students, 1: first_BCHW}, teachers)
        return torch.stack(list(terms.values())).sum()

    maps_BCHW = students[1].requires_grad_()
    (gradient_BCHW,) = torch.autograd.grad(total(maps_BCHW), maps_BCHW, create_graph=True)
    direction_BCHW = maps(*maps_BCHW.shape, seed=5)
    (found,) = torch.autograd.grad((gradient_BCHW * direction_BCHW).sum(), maps_BCHW)
    step = 1e-5
    ahead, behind = (
        torch.autograd.grad(total(moved_BCHW), moved_BCHW)[0]
        for moved_BCHW in (
            (maps_BCHW + sign * step * direction_BCHW).detach().requires_grad_() for sign in (1, -1)
        )
    )
    wanted = (ahead - behind) / (2 * step)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("graphs", ["image", "batch"])
def test_the_plain_way_is_for_torch_func(graphs: str):
    """The gradient of adapters, as a function of them."""
    plain, _ = plain_and_fast(graphs=graphs)
    plain.eval()
    students, teachers = features(STUDENT, 1), features(TEACHER, 2)

    def total(parameters: dict[str, Tensor]) -> Tensor:
        terms = torch.func.functional_call(plain, parameters, (students, teachers))
        return torch.stack(list(terms.values())).sum()

    parameters = dict(plain.named_parameters())
    found = torch.func.grad(total)({name: one.detach() for name, one in parameters.items()})
    wanted = torch.autograd.grad(total(parameters), list(parameters.values()))
    for one, other in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(one, other)


# Numerical faults


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_maps", DTYPES, ids=str)
@pytest.mark.parametrize("settings", [{}, {"graphs": "batch"}, {"adapter": "plain"}], ids=str)
def test_modules_and_maps_of_any_two_types_are_taken_in_full_precision(
    settings: dict[str, Any], of_maps: torch.dtype, dtype: torch.dtype, accelerated: bool
):
    settings = {"student": TEACHER, "accelerated": accelerated} | settings
    loss, exact = a_loss(**settings).to(dtype), a_loss(**settings).double()
    common = torch.promote_types(torch.promote_types(dtype, of_maps), torch.float32)
    close = {"rtol": 1e3 * torch.finfo(common).eps, "atol": 1e2 * torch.finfo(common).eps}
    for training, at_once in itertools.product((True, False), repeat=2):
        exact.load_state_dict(loss.state_dict())
        students = {k: v.requires_grad_() for k, v in features(TEACHER, 1, of_maps).items()}
        doubles = {k: v.detach().double().requires_grad_() for k, v in students.items()}
        terms, gradients = [], []
        for module, given in ((loss, students), (exact, doubles)):
            teachers = {k: v.to(given[k].dtype) for k, v in features(TEACHER, 2, of_maps).items()}
            module.train(training).zero_grad()
            found = (module.terms_with_gradient if at_once else module)(given, teachers)
            sum(module.term_weights[name] * term for name, term in found.items()).backward()
            terms.append(torch.stack(list(found.values())))
            gradients.append([one.grad for one in (*given.values(), *module.parameters())])
        assert terms[0].dtype == common
        torch.testing.assert_close(terms[0].double(), terms[1], **close)
        for one, other, of in zip(
            *gradients, [*students.values(), *loss.parameters()], strict=True
        ):
            assert one.dtype == of.dtype
            limit = max(1e-4, 2 * torch.finfo(of.dtype).eps) * float(other.abs().max())
            torch.testing.assert_close(one.double(), other, rtol=0, atol=limit + 1e-6)
        for one, other in zip(loss.buffers(), exact.buffers(), strict=True):
            torch.testing.assert_close(one, other.to(one.dtype), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("operators", [PLAIN, FAST], ids=["plain", "fast"])
@pytest.mark.parametrize("scale", [1e15, 1e19, 1e25, 1e30])
def test_the_vertex_loss_of_huge_maps_is_that_of_small_ones(scale: float, operators: Operators):
    student, teacher = (maps(2, 5, 3, 4, seed=seed).float() for seed in (0, 1))
    # of one mask, whatever the scale
    found, wanted = (
        value_and_gradient(
            lambda x, factor=factor: LevelMaps(x, factor * teacher, factor, operators).vertex(),
            factor * student,
        )
        for factor in (scale, 1.0)
    )
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1] * scale, wanted[1])


@pytest.mark.parametrize("operators", [PLAIN, FAST], ids=["plain", "fast"])
def test_maps_that_are_not_finite_reach_the_vertex_loss(operators: Operators):
    for value in (torch.nan, torch.inf):
        broken = maps(1, 3, 2, 2)
        broken[0, 1, 0, 0] = value
        for pair in ((broken, maps(1, 3, 2, 2)), (maps(1, 3, 2, 2), broken)):
            assert not LevelMaps(*pair, 0.5, operators).vertex().isfinite().any()
