"""The step, the loop, evaluation, and the checkpoint, on real models and 8x8 images.

Shapes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score, f1_score
from small_runs import (
    CPU,
    SPEC,
    TensorStream,
    curve,
    digits_stream,
    make_config,
    make_training,
    random_batch,
    random_stream,
    random_teacher,
    same,
    weights,
)

from raygkd.assembly.methods import suits
from raygkd.assembly.models import student_file
from raygkd.assembly.training import amp_dtype, build_training
from raygkd.config import OptimConfig, from_yaml
from raygkd.data.parquet import ImageTable
from raygkd.deploy.modules import DeployedClassifier
from raygkd.engine import (
    Teacher,
    Training,
    check_terms,
    evaluate,
    gradient_norms,
    read_checkpoint,
    restore,
    run_epoch,
    save_checkpoint,
    training_step,
)
from raygkd.engine.gradient_units import STEPS
from raygkd.engine.loop import hash_seed
from raygkd.engine.schedule import lr_factor
from raygkd.errors import ConfigError, DataError, Diverged, Stopped
from raygkd.models import build_classifier, build_from_file, load_model_file, save_model_file
from raygkd.registry import METHODS

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED_WEIGHTS = {
    "none": {"task": 1.0},
    "kd": {"task": 0.25, "kd": 0.75},
    "dkd": {"task": 1.0, "dkd": 1.0},
    "dist": {"task": 1.0, "dist": 1.0},
    "logit-std": {"task": 0.1, "logit-std": 9.0},
    "fitnet": {"task": 1.0, "fitnet": 100.0},
    "at": {"task": 1.0, "at": 1000.0},
    "sp": {"task": 1.0, "sp": 3000.0},
    "rkd": {"task": 1.0, "rkd": 1.0},
    "pkt": {"task": 1.0, "pkt": 30000.0},
    "vid": {"task": 1.0, "vid": 1.0},
    "ickd": {"task": 1.0, "ickd": 2.5},
    "crd": {"task": 1.0, "crd": 0.8},
    "reviewkd": {"task": 1.0, "reviewkd": 1.0},
    "dense": {"task": 1.0, "dense": 1.0},
    "trg": {"task": 1.0, "trg": 1.0},
    "prg": {"prg": 1.0},
    "vrm": {"task": 1.0, "vrm": 1.0},
    "graph-metrics": {"task": 1.0, "graph-metrics": 1.0},
    "graph": {"task": 1.0, "vertex": 0.5, "edge": 2.0, "spectral": 0.125},
    "graph+kd": {"task": 0.25, "kd": 0.75, "vertex": 0.5, "edge": 2.0, "spectral": 0.125},
    "graph+dist": {"task": 1.0, "dist": 1.0, "vertex": 0.5, "edge": 2.0, "spectral": 0.125},
    "graph+metrics": {
        **{"task": 1.0, "graph-metrics": 1.0},
        **{"vertex": 0.5, "edge": 2.0, "spectral": 0.125},
    },
}


# The teacher


def test_teacher_is_bit_identical_after_training(digits: ImageTable):
    training = make_training(digits)
    assert training.teacher is not None
    model = training.teacher.model
    before = weights(model)
    curve(training)
    assert same(weights(model), before)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_teacher_freezes_a_model_that_was_training():
    teacher = Teacher(build_classifier("resnet8", 10).train(), pairs={1: 1, 3: 3})
    before = weights(teacher.model)
    output = teacher(torch.rand(4, 3, 8, 8))
    assert same(weights(teacher.model), before)
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert {level: f.shape for level, f in output.features.items()} == {
        1: (4, 16, 8, 8),
        3: (4, 64, 2, 2),
    }
    assert output.logits_BK.shape == (4, 10)
    assert not any(t.requires_grad for t in (output.logits_BK, *output.features.values()))


def test_each_model_sees_images_as_it_was_trained_on_them():
    teacher = dataclasses.replace(random_teacher(), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
    training = make_training(random_stream(), method="kd", teacher=teacher)
    seen: list[torch.Tensor] = []
    assert training.teacher is not None
    for model in (training.teacher.model, training.objective.student):
        model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0]))
    batch = random_batch()
    training_step(training, batch)
    sides = [(teacher.mean, teacher.std), (SPEC.mean, SPEC.std)]
    for images_BCHW, statistics in zip(seen, sides, strict=True):
        mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
        assert torch.allclose(images_BCHW, (batch["image"] / 255 - mean) / std, atol=1e-6)


def test_teacher_is_in_neither_objective_nor_optimizer():
    training = make_training(random_stream())
    assert training.teacher is not None
    teacher = {id(tensor) for tensor in training.teacher.model.state_dict(keep_vars=True).values()}
    objective = {id(tensor) for tensor in training.objective.state_dict(keep_vars=True).values()}
    optimized = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    assert not teacher & (objective | optimized)
    assert optimized == {id(parameter) for parameter in training.objective.parameters()}


# Training


def test_all_methods_for_classifiers_are_tested():
    assert set(EXPECTED_WEIGHTS) == {
        name for name in METHODS.names() if suits(name, "classification")
    }


@pytest.mark.parametrize("method", EXPECTED_WEIGHTS)
def test_every_method_trains_all_parameters(digits: ImageTable, method: str):
    training = make_training(
        digits, method=method, epochs=4, alpha=0.5, beta=2.0, gamma=0.125, kd_weight=0.75
    )
    expected = EXPECTED_WEIGHTS[method]
    epochs = curve(training)
    # the weights of some rise in the first epoch, and the loss of others falls in it alone
    assert epochs[-1]["train_loss"] < max(epochs[number]["train_loss"] for number in (0, 1))
    assert training.objective.term_weights == expected
    for name, parameter in training.objective.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    for metrics in epochs:
        terms = {name[5:]: metrics[name] for name in metrics if name.startswith("loss_")}
        assert terms.keys() == expected.keys()
        total = sum(weight * terms[name] for name, weight in expected.items())
        # after the ramp of their weights, a twelfth of the steps
        if method not in ("dkd", "reviewkd") or metrics["epoch"] > 1:
            assert metrics["train_loss"] == pytest.approx(total, rel=1e-6)


def test_the_weight_of_dkd_rises_over_a_twelfth_of_the_steps():
    training = make_training(random_stream(batches=6), method="dkd", epochs=4)
    terms = {"task": torch.tensor(0.0), "dkd": torch.tensor(1.0)}
    weights = [float(training.objective.total(terms, step / 24)) for step in range(4)]
    assert weights == [0.0, 0.5, 1.0, 1.0]
    shares = []
    for batch in training.stream.train_batches(0):
        shares.append(training.progress)
        training_step(training, batch)
    assert shares == pytest.approx([step / 24 for step in range(6)])


def test_the_weight_of_a_baseline_can_be_set():
    training = make_training(random_stream(), method="at", baseline_weight=3.0)
    assert training.objective.term_weights == {"task": 1.0, "at": 3.0}


@pytest.mark.parametrize(
    ("method", "levels", "read"),
    [
        *(("at", None, (1, 2, 3)), ("fitnet", None, (2,)), ("sp", None, (3,))),
        *(("at", (1, 3), (1, 3)), ("sp", (1, 2), (1, 2)), ("dkd", (1,), ())),
    ],
)
def test_a_baseline_reads_its_own_levels_or_those_given(
    method: str, levels: tuple[int, ...] | None, read: tuple[int, ...]
):
    training = make_training(random_stream(), method=method, levels=levels)
    assert training.objective.levels == training.objective.baseline_levels == read
    assert training.objective.reads_logits == (method == "dkd")


def test_a_run_with_a_baselines_adapters_goes_on_as_if_unbroken(tmp_path: Path):
    def training() -> Training:
        return make_training(random_stream(), method="ickd", epochs=3)

    whole = training()
    expected = curve(whole)
    broken = training()
    run_epoch(broken)
    save_checkpoint(tmp_path / "c.pt", broken)
    resumed = training()
    restore(resumed, read_checkpoint(tmp_path / "c.pt"))
    assert curve(resumed) == expected[1:]
    assert same(weights(resumed.objective), weights(whole.objective))


def test_epoch_reports_loss_terms_as_means_over_steps(digits: ImageTable):
    """With a learning rate near zero every step sees the weights of the start."""
    training = make_training(digits, method="none", lr=1e-30)
    metrics = run_epoch(training)
    batches = list(training.stream.train_batches(0))
    assert len(batches) == training.stream.steps_per_epoch == 4
    model = training.objective.student
    images = [training.normalise(batch["image"] / 255) for batch in batches]
    logits = [model(images_BCHW) for images_BCHW in images]
    losses = [
        F.cross_entropy(logits_BK, batch["label"]).item()
        for logits_BK, batch in zip(logits, batches, strict=True)
    ]
    right = sum(
        (logits_BK.argmax(1) == batch["label"]).sum().item()
        for logits_BK, batch in zip(logits, batches, strict=True)
    )
    assert metrics["loss_task"] == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert metrics["train_accuracy"] == right / 256
    assert metrics["epoch"] == 1
    assert metrics["bad_images"] == 0
    assert metrics["epoch_seconds"] > 0
    assert metrics["images_per_second"] > 256 / metrics["epoch_seconds"]
    assert metrics["first_step_seconds"] > 0


def test_student_learns_digits(digits: ImageTable):
    training = make_training(digits, method="none", epochs=8, batch_size=32, lr=0.1)
    assert curve(training)[-1]["val_score"] > 0.7


def test_equal_seeds_give_equal_curves_and_other_seeds_others(digits: ImageTable):
    def run(seed: int, elsewhere: int) -> list[dict[str, float]]:
        torch.manual_seed(elsewhere)
        return curve(
            make_training(
                digits,
                student="tiny-dropout",
                teacher=random_teacher("tiny"),
                dim=4,
                seed=seed,
            )
        )

    first = run(seed=3, elsewhere=1)
    assert run(seed=3, elsewhere=2) == first
    other = run(seed=4, elsewhere=1)
    assert all(a["train_loss"] != b["train_loss"] for a, b in zip(first, other, strict=True))


def test_epoch_depends_on_its_seed_and_number_and_not_on_what_ran_before():
    def run(between: Callable[[Training], object]) -> list[float]:
        training = make_training(random_stream(), student="tiny-dropout", method="none", epochs=3)
        losses = []
        while training.epoch < training.epochs:
            between(training)
            losses.append(run_epoch(training)["train_loss"])
        return losses

    expected = run(lambda training: None)
    assert run(lambda training: torch.rand(1)) == expected
    assert run(lambda training: training.objective.eval()) == expected
    assert len(set(expected)) == 3


def test_epoch_seed_differs_by_seed_epoch_and_rank():
    seeds = {hash_seed(s, e, r) for s in range(5) for e in range(20) for r in range(4)}
    assert len(seeds) == 5 * 20 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_all_methods_of_one_seed_start_from_one_student():
    students = [make_training(random_stream(), method=method) for method in EXPECTED_WEIGHTS]
    first = weights(students[0].objective.student)
    assert all(same(weights(training.objective.student), first) for training in students)


def test_golden_curve():
    expected = json.loads((GOLDEN / "curve.json").read_text())
    epochs = runpy.run_path(str(GOLDEN / "print_curve.py"))["golden_curve"]()
    assert len(epochs) == len(expected) == 3
    for epoch, values in zip(epochs, expected, strict=True):
        assert epoch == pytest.approx(values, rel=1e-4)


def test_clipping_limits_the_norm_of_the_gradient():
    def norm(clip_norm: float | None) -> float:
        training = make_training(random_stream(), clip_norm=clip_norm)
        training_step(training, random_batch())
        gradients = [p.grad for p in training.objective.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).item()

    assert norm(None) > 0.05
    assert norm(0.01) == pytest.approx(0.01, rel=1e-3)


# Divergence


def test_divergence_names_term_and_epoch():
    training = make_training(random_stream(), method="none", lr=1e30, clip_norm=None)
    with pytest.raises(Diverged, match=r"^loss 'task' is not finite in epoch 1; lower --lr") as e:
        run_epoch(training)
    assert (e.value.term, e.value.epoch) == ("task", 1)


def test_divergence_of_a_later_epoch_names_it():
    training = make_training(random_stream())
    run_epoch(training)
    with torch.no_grad():
        next(training.objective.student.parameters()).fill_(math.nan)
    with pytest.raises(Diverged, match="in epoch 2"):
        run_epoch(training)


def test_divergence_survives_pickling():
    error = pickle.loads(pickle.dumps(Diverged("edge", 7)))
    assert (type(error), error.term, error.epoch) == (Diverged, "edge", 7)
    assert str(error) == str(Diverged("edge", 7))


# The check before the first step


def copy_of_teacher(training: Training) -> None:
    """Make the student of a run equal to its teacher, with fixed statistics."""
    assert training.teacher is not None
    training.objective.student.load_state_dict(training.teacher.model.state_dict())
    training.objective.eval()


def detach_last_stage(training: Training) -> None:
    """Cut the student's gradient at its deepest level, before the tap reads it."""
    stage = training.objective.student.get_submodule("stage3")
    stage.register_forward_hook(lambda module, inputs, output: output.detach(), prepend=True)


def break_gradient(training: Training) -> None:
    """Make the gradient of the first two levels too large for float32."""
    stage = training.objective.student.get_submodule("stage3")
    stage.register_full_backward_hook(lambda *_: (torch.full((64, 32, 4, 4), 1e30),))


def break_weights(training: Training) -> None:
    """Make the student's first layer give NaN."""
    with torch.no_grad():
        next(training.objective.student.parameters()).fill_(math.nan)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (copy_of_teacher, {"method": "kd"}, "'kd' is 0 with"),
        (copy_of_teacher, {"method": "graph", "adapter": "plain"}, "'vertex' is 0 with"),
        (detach_last_stage, {"method": "graph", "levels": [3]}, "'vertex' is .* of norm 0 in the"),
        (break_gradient, {"method": "none"}, "'task' is 2.* with a gradient of norm inf in"),
        (break_weights, {"method": "none"}, "'task' is nan with a gradient of norm nan"),
    ],
    ids=["equal logits", "equal maps", "detached maps", "infinite gradient", "not finite"],
)
def test_a_term_that_cannot_teach_is_refused_by_name(
    change: Callable[[Training], None], settings: dict[str, Any], message: str
):
    training = make_training(random_stream(), **settings)
    change(training)
    before = {name: buffer.clone() for name, buffer in training.objective.named_buffers()}
    with pytest.raises(ConfigError, match=f"^loss term {message}") as raised:
        check_terms(training, random_batch())
    assert "\n" not in str(raised.value)
    assert same(dict(training.objective.named_buffers()), before)
    assert all(p.grad is None for p in training.objective.parameters())


def test_check_of_terms_leaves_no_trace_and_tells_gradient_norms():
    training = make_training(random_stream())
    training.objective.train()
    before = weights(training.objective)
    batch = random_batch()
    norms = check_terms(training, batch)
    assert same(weights(training.objective), before)
    assert all(p.grad is None for p in training.objective.parameters())
    assert norms.keys() == EXPECTED_WEIGHTS["graph+kd"].keys()

    images_BCHW, labels_B = training.to_device(batch)
    logits_BK = training.objective.student(training.normalise(images_BCHW))
    F.cross_entropy(logits_BK, labels_B).backward()
    gradients = [p.grad for p in training.objective.student.parameters() if p.grad is not None]
    assert norms["task"] == pytest.approx(torch.nn.utils.get_total_norm(gradients).item(), rel=1e-5)


def test_first_epoch_checks_the_terms_and_later_ones_do_not():
    training = make_training(random_stream(), method="graph", levels=[3])
    detach_last_stage(training)
    with pytest.raises(ConfigError, match="'vertex'"):
        run_epoch(training)
    training.epoch = 1
    run_epoch(training)


# Precision and compilation


def test_bf16_keeps_graph_losses_and_weights_in_float32(digits: ImageTable):
    training = make_training(digits, amp="bf16")
    terms, logits_BK = training_step(training, random_batch())
    assert logits_BK.dtype == torch.bfloat16
    assert {term.dtype for term in terms.values()} == {torch.float32}
    for parameter in training.objective.parameters():
        assert parameter.grad is not None
        assert parameter.dtype == parameter.grad.dtype == torch.float32
    epochs = curve(training)
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]


def test_bf16_losses_are_near_those_of_full_precision():
    half, _ = training_step(make_training(random_stream(), amp="bf16"), random_batch())
    full, _ = training_step(make_training(random_stream(), amp="none"), random_batch())
    assert half["total"] != full["total"]
    for name, term in full.items():
        assert half[name].item() == pytest.approx(term.item(), rel=0.05), name


@pytest.mark.parametrize(("amp", "enabled"), [("none", False), ("bf16", False), ("fp16", True)])
def test_gradients_are_scaled_for_fp16_alone(amp: str, enabled: bool):
    assert make_training(random_stream(), amp=amp).scaler.is_enabled() is enabled


def test_automatic_precision_is_bf16_on_cuda_and_none_elsewhere():
    assert amp_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert amp_dtype("auto", CPU) is None


@pytest.mark.parametrize("levels", [(1,), (1, 2)], ids=["first", "others after it"])
def test_compiled_models_train_as_eager_ones(digits: ImageTable, levels: tuple[int, ...]):
    def first_epoch(compiled: bool) -> dict[str, float]:
        training = make_training(
            digits,
            teacher=random_teacher("tiny"),
            student="tiny",
            levels=levels,
            dim=4,
            # rounding grows with the weight
            alpha=1.0,
            compile=compiled,
        )
        assert training.teacher is not None
        for model in (training.objective.student, training.teacher.model):
            assert (model._compiled_call_impl is not None) is compiled
        return curve(training)[0]

    compiled, eager = first_epoch(True), first_epoch(False)
    losses = [name for name in eager if "loss" in name]
    assert {name: compiled[name] for name in losses} == pytest.approx(
        {name: eager[name] for name in losses}, rel=1e-4
    )


# The learning rate


def optim(**settings: Any) -> OptimConfig:
    return make_config(epochs=10, **settings).optim


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, {0: 1.0, 99: 1.0}),
        (
            {"schedule": "constant", "warmup_epochs": 0.5},
            {0: 0.2, 1: 0.4, 3: 0.8, 4: 1.0, 5: 1.0, 99: 1.0},
        ),
        ({"schedule": "cosine"}, {0: 1.0, 25: 0.5 + math.sqrt(0.125), 50: 0.5, 100: 0.0}),
        (
            {"schedule": "cosine", "warmup_epochs": 2.0},
            {0: 0.05, 19: 1.0, 20: 1.0, 60: 0.5, 100: 0.0},
        ),
        (
            {"schedule": "multistep", "milestones": [0.5, 0.75], "lr_decay": 0.2},
            {0: 1.0, 49: 1.0, 50: 0.2, 74: 0.2, 75: 0.04, 100: 0.04},
        ),
        (
            {"schedule": "multistep", "milestones": [0.5], "warmup_epochs": 1.0},
            {0: 0.1, 9: 1.0, 10: 1.0, 49: 1.0, 50: 0.1},
        ),
    ],
)
def test_learning_rate_follows_its_schedule(settings: dict[str, Any], expected: dict[int, float]):
    factors = {step: lr_factor(step, 10, optim(**settings)) for step in expected}
    assert factors == pytest.approx(expected, abs=1e-12)


def test_every_step_has_its_learning_rate_and_the_last_ends_cosine_at_zero():
    training = make_training(random_stream(3), method="none", lr=0.2, epochs=2)
    rates = []
    for epoch in range(2):
        for batch in training.stream.train_batches(epoch):
            rates.append(training.optimizer.param_groups[0]["lr"])
            training_step(training, batch)
    expected = [0.2 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert rates == pytest.approx(expected)
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


# Evaluation


def test_evaluation_scores_every_image_once_in_eval_mode(digits: ImageTable):
    training = make_training(digits, student="tiny-dropout", method="none")
    run_epoch(training)
    modes: set[bool] = set()
    student = training.objective.student
    handle = student.register_forward_hook(
        lambda *_: modes.add(student.get_submodule("stage2.3").training)
    )
    before = weights(student)
    scores = evaluate(training, "val")
    handle.remove()
    assert modes == {False}
    assert student.training
    assert same(weights(student), before)

    stream = digits_stream(digits, make_config())
    rows = stream.splits.val
    batches = list(stream.eval_batches("val"))
    images_BCHW = torch.cat([batch["image"] for batch in batches])
    labels_B = torch.from_numpy(digits.labels[rows])
    assert len(images_BCHW) == len(rows) == 129
    student.eval()
    with torch.no_grad():
        logits_BK = student(training.normalise(images_BCHW / 255))
    top5_B = (logits_BK.topk(5).indices == labels_B[:, None]).any(1)
    assert scores == pytest.approx(
        {
            "score": (logits_BK.argmax(1) == labels_B).float().mean().item(),
            "loss": F.cross_entropy(logits_BK.double(), labels_B).item(),
            "top5": top5_B.float().mean().item(),
            "accuracy": (logits_BK.argmax(1) == labels_B).float().mean().item(),
            "balanced-accuracy": balanced_accuracy_score(labels_B, logits_BK.argmax(1)),
            "macro-f1": f1_score(labels_B, logits_BK.argmax(1), average="macro"),
            "log-loss": F.cross_entropy(logits_BK.double(), labels_B).item(),
        },
        rel=1e-6,
    )


def test_test_split_is_scored_by_name(digits: ImageTable):
    training = make_training(digits, method="none")
    assert evaluate(training, "test") != evaluate(training, "val")


def test_terms_move_the_student_as_much_as_their_weights_say(digits: ImageTable):
    training = make_training(
        digits, **{"weights_unit": "gradient", "alpha": 3.0, "beta": 0.5, "gamma": 0.0}
    )
    norms: list[dict[str, float]] = []
    units = training.objective.units
    assert units is not None
    add = units.add
    units.add = lambda found: (norms.append(dict(found)), add(found))[1]  # type: ignore[method-assign]
    first, second = run_epoch(training), run_epoch(training)
    assert len(norms) == training.stream.steps_per_epoch * 2 == 8
    run_epoch(training)
    assert len(norms) == STEPS == 10
    means = {name: sum(one[name] for one in norms) / STEPS for name in norms[0]}
    factors = training.objective.factors
    assert factors["vertex"] * means["vertex"] == pytest.approx(3.0 * means["task"])
    assert factors["edge"] * means["edge"] == pytest.approx(0.5 * means["task"])
    assert factors["kd"] == training.objective.term_weights["kd"]
    assert first["factor_vertex"] != second["factor_vertex"]
    assert training.metrics["factor_vertex"] == factors["vertex"]
    assert first["gradient_vertex"] == norms[0]["vertex"]
    fixed = run_epoch(training)
    assert fixed["factor_vertex"] == factors["vertex"]


def test_a_baselines_weight_is_a_share_where_it_is_given():
    published = make_training(random_stream(), method="at", weights_unit="gradient")
    assert published.objective.units is None
    assert published.objective.factors["at"] == 1000.0
    both = make_training(
        random_stream(), **{"method": "graph+dist", "weights_unit": "gradient", "gamma": 0.0}
    )
    assert both.objective.units is not None
    assert set(both.objective.units.terms) == {"dist", "vertex", "edge"}
    assert both.objective.term_weights["dist"] == 1.0
    given = make_training(
        random_stream(), method="at", weights_unit="gradient", baseline_weight=2.0
    )
    run_epoch(given)
    norms = gradient_norms(given, random_batch())[1]
    assert 0.2 < given.objective.factors["at"] * norms["at"] / norms["task"] < 20.0


# The checkpoint


def test_checkpoint_holds_the_whole_run_and_no_teacher(digits: ImageTable, tmp_path: Path):
    training = make_training(digits)
    run_epoch(training)
    save_checkpoint(tmp_path / "new" / "checkpoint.pt", training)
    state = torch.load(tmp_path / "new" / "checkpoint.pt", weights_only=True)
    assert state.keys() == {
        "format", "student", "learning", "adapters",
        "baseline", "units", "optimizer", "schedule", "scaler", "patience", "epoch", "metrics",
        "parts", "rng", "config",
    }  # fmt: skip
    assert same(state["student"], training.objective.student.state_dict())
    assert training.objective.graph is not None
    assert same(state["adapters"], training.objective.graph.state_dict())
    assert {name.split(".")[1] for name in state["adapters"]} == {"1", "2", "3"}
    learned = list(training.objective.parameters())
    assert len(state["optimizer"]["state"]) == len(learned)
    assert all(entry["momentum_buffer"].any() for entry in state["optimizer"]["state"].values())
    assert state["schedule"]["last_epoch"] == 4
    assert state["epoch"] == 1
    assert state["metrics"] == training.metrics
    assert state["parts"] == [None]
    assert len(state["rng"]) == 1
    assert torch.equal(state["rng"][0]["cpu"], torch.get_rng_state())
    assert from_yaml(state["config"], where="checkpoint") == make_config()
    assert os.listdir(tmp_path / "new") == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("student", "settings"),
    [
        ("resnet8", {"amp": "bf16", "clip_norm": 1.0}),
        ("tiny-dropout", {"levels": [1], "schedule": "multistep", "warmup_epochs": 2.5}),
        ("resnet8", {"weights_unit": "gradient", "graphs": "batch", "alpha": 3.0, "beta": 1.0}),
        ("torchvision:mobilenet_v3_small", {"method": "kd", "lr": 0.01, "student_weights": "none"}),
    ],
)
def test_resumed_run_equals_one_without_a_break(
    digits: ImageTable, tmp_path: Path, student: str, settings: dict[str, Any]
):
    def run(elsewhere: int) -> Training:
        torch.manual_seed(elsewhere)
        return make_training(digits, **{"epochs": 4, "student": student, **settings})

    whole = run(elsewhere=1)
    expected = curve(whole)
    broken_off = run(elsewhere=2)
    first = [run_epoch(broken_off)["train_loss"] for _ in range(2)]
    save_checkpoint(tmp_path / "checkpoint.pt", broken_off)
    resumed = run(elsewhere=3)
    restore(resumed, read_checkpoint(tmp_path / "checkpoint.pt"))
    assert first == [metrics["train_loss"] for metrics in expected[:2]]
    assert curve(resumed) == expected[2:]
    assert same(weights(resumed.objective), weights(whole.objective))
    momenta = [
        [entry["momentum_buffer"] for entry in run.optimizer.state_dict()["state"].values()]
        for run in (resumed, whole)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))
    assert resumed.schedule.state_dict() == whole.schedule.state_dict()


@pytest.mark.parametrize("unit", ["loss", "gradient"])
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_run_that_is_stopped_after_a_step_goes_on_as_one_without_a_break(
    digits: ImageTable, tmp_path: Path, steps: int, unit: str
):
    def run() -> Training:
        return make_training(
            digits, student="tiny-dropout", levels=[1], epochs=2, weights_unit=unit
        )

    whole = run()
    expected = curve(whole)
    stopped = run()
    asked = iter([False] * (steps - 1) + [True])
    with pytest.raises(Stopped):
        run_epoch(stopped, lambda: next(asked))
    assert next(asked, None) is None
    assert stopped.part is not None
    assert (stopped.epoch, stopped.part.steps, stopped.metrics) == (0, steps, {})
    save_checkpoint(tmp_path / "checkpoint.pt", stopped)
    torch.manual_seed(99)
    resumed = run()
    restore(resumed, read_checkpoint(tmp_path / "checkpoint.pt"))
    assert curve(resumed) == expected
    assert same(weights(resumed.objective), weights(whole.objective))
    assert resumed.part is None


def test_run_that_goes_on_counts_the_seconds_before_the_break(digits: ImageTable, tmp_path: Path):
    training = make_training(digits, method="none", epochs=1)
    with pytest.raises(Stopped):
        run_epoch(training, lambda: True)
    assert training.part is not None
    training.part.seconds = 1000.0
    save_checkpoint(tmp_path / "checkpoint.pt", training)
    resumed = make_training(digits, method="none", epochs=1)
    restore(resumed, read_checkpoint(tmp_path / "checkpoint.pt"))
    metrics = run_epoch(resumed)
    assert metrics["epoch_seconds"] > 1000
    assert metrics["images_per_second"] < 1


def test_restoring_brings_back_the_random_state(tmp_path: Path):
    training = make_training(random_stream(), method="none")
    save_checkpoint(tmp_path / "checkpoint.pt", training)
    expected = torch.rand(4)
    torch.manual_seed(77)
    restore(training, read_checkpoint(tmp_path / "checkpoint.pt"))
    assert torch.equal(torch.rand(4), expected)


def test_write_that_fails_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path):
    path = tmp_path / "checkpoint.pt"
    training = make_training(random_stream(), method="none")
    save_checkpoint(path, training)
    old = path.read_bytes()
    training.epoch = 5
    training.config = lambda: "cannot be pickled"  # type: ignore[assignment]
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_checkpoint(path, training)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def flip_a_byte(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"no checkpoint",
        flip_a_byte,
    ],
    ids=["cut off", "empty", "text", "one bit"],
)
def test_damaged_checkpoint_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, make_training(random_stream(), method="none"))
    path.write_bytes(damage(path.read_bytes()))
    check_refusal(path, "damaged")


def test_file_of_another_kind_is_no_checkpoint(tmp_path: Path):
    path = tmp_path / "model.pt"
    save_model_file(path, random_teacher())
    check_refusal(path, "not a checkpoint of this version of raygkd")
    torch.save([1, 2], path)
    check_refusal(path, "not a checkpoint of this version of raygkd")


def test_missing_checkpoint_is_named(tmp_path: Path):
    check_refusal(tmp_path / "nowhere.pt", "No such file")
    check_refusal(tmp_path, "Is a directory")


def test_checkpoint_executes_nothing(tmp_path: Path):
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"format": "raygkd-checkpoint-1", "student": Harmful()}, tmp_path / "harm.pt")
    check_refusal(tmp_path / "harm.pt", "damaged")
    assert not (tmp_path / "made").exists()


def check_refusal(path: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        read_checkpoint(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


# The model for use


def test_saved_model_is_the_student_alone(digits: ImageTable, tmp_path: Path):
    training = make_training(digits, epochs=1)
    curve(training)
    save_checkpoint(tmp_path / "checkpoint.pt", training)
    state = read_checkpoint(tmp_path / "checkpoint.pt")["student"]
    saved = student_file(make_config(epochs=1), SPEC, state, {"val_score": 0.5, "x": math.nan})
    save_model_file(tmp_path / "model.pt", saved)

    loaded = load_model_file(tmp_path / "model.pt")
    assert loaded.state_dict.keys() == build_classifier("resnet8", 10).state_dict().keys()
    assert loaded.scores == {"val_score": 0.5}
    student = training.objective.student.eval()
    images_BCHW = torch.rand(5, 3, 8, 8)
    with torch.no_grad():
        expected_BK = student(training.normalise(images_BCHW))
        assert torch.equal(build_from_file(loaded)(training.normalise(images_BCHW)), expected_BK)
        assert torch.allclose(DeployedClassifier(loaded).eval()(images_BCHW), expected_BK)


def test_method_with_a_teacher_needs_one():
    with pytest.raises(ValueError, match="this run needs a teacher"):
        build_training(
            make_config(method="kd"),
            spec=SPEC,
            teacher_file=None,
            stream=TensorStream([random_batch()]),
            device=CPU,
        )
