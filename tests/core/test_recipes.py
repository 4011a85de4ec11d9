"""Recipes: views, mixed images, the labels' loss, averaged weights, accumulation and patience.

Shapes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_runs import (
    CPU,
    curve,
    make_training,
    random_batch,
    random_stream,
    same,
    weights,
)
from torch import Tensor, nn

from raygkd.assembly.compatibility import check_settings
from raygkd.assembly.derived_configs import logit_baseline
from raygkd.assembly.recipes import balanced_weights, unused_cache
from raygkd.cli.options import resolve
from raygkd.config import (
    Config,
    DataConfig,
    from_mapping,
    from_yaml,
    given,
    option_settings,
    to_mapping,
    to_yaml,
    with_settings,
)
from raygkd.config.recipe import RECIPES, recipe_options
from raygkd.config.search_space import read_space, searchable
from raygkd.data import build_transform
from raygkd.data.parquet import ImageTable
from raygkd.data.run_images import open_images
from raygkd.data.views import Views
from raygkd.engine import Training, evaluate, read_checkpoint, restore, run_epoch, save_checkpoint
from raygkd.engine.gradient_units import WITHOUT_LABELS
from raygkd.engine.label_loss import LabelLoss
from raygkd.engine.mixing import Mixing
from raygkd.engine.patience import Patience
from raygkd.engine.step import Batch, optimiser_step, training_step
from raygkd.errors import ConfigError, Stopped
from raygkd.losses.logits import dkd_loss
from raygkd.models.classifiers import CLASSIFIERS
from raygkd.models.staged import StagedClassifier
from raygkd.report.summary import command_line
from raygkd.workflows.teachers import teacher_folder

ALL_ON = {
    "mixup": 0.4,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
    "ema": 0.8,
    "accumulate": 3,
    "patience": 3,
}


def unnormalised(num_classes: int) -> StagedClassifier:
    """Return a stage without batch normalisation."""
    stages = [nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())]
    return StagedClassifier(nn.Identity(), stages, 8, num_classes)


CLASSIFIERS.register("tiny-unnormalised")(unnormalised)


# The labels' loss


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_labels_loss_by_hand(smoothing: float, weighted: bool):
    logits_BK = torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, 1.0]])
    class_weights = [0.5, 1.0, 2.0] if weighted else [1.0, 1.0, 1.0]
    loss = LabelLoss(smoothing, torch.tensor(class_weights) if weighted else None)
    log_BK = logits_BK.log_softmax(1)
    shares_BK = torch.tensor([[0.0, 0.7, 0.3], [1.0, 0.0, 0.0]])
    smooth_BK = (1 - smoothing) * shares_BK + smoothing / 3
    by_hand = -(smooth_BK * torch.tensor(class_weights) * log_BK).sum(1).mean()
    assert loss(logits_BK, shares_BK).item() == pytest.approx(by_hand.item(), rel=1e-6)
    hard = torch.tensor([1, 0])
    assert loss(logits_BK, hard).item() == pytest.approx(
        loss(logits_BK, F.one_hot(hard, 3).float()).item(), rel=1e-6
    )


def test_balanced_weights_make_the_classes_count_alike():
    weights_K = balanced_weights((30, 10, 0, 5))
    assert weights_K.tolist() == pytest.approx([0.5, 1.5, 0.0, 3.0])
    assert (weights_K * torch.tensor([30, 10, 0, 5])).sum().item() == pytest.approx(45)


def test_the_images_of_a_run_are_counted_by_class_and_changed_in_training_alone(tmp_path: Path):
    images = open_images(DataConfig(limit_train=300), seed=0, output=tmp_path)
    counts = torch.tensor(images.table.labels[images.rows["train"]]).bincount(minlength=10)
    assert images.spec.class_counts == tuple(counts.tolist())
    assert sum(images.spec.class_counts) == 300
    views = Views(erase=1.0)
    assert images.transform("train", views) != images.transform("train")
    image = torch.full((3, 8, 8), 200, dtype=torch.uint8)
    sample = images.transform("val", views).sample(image, 0, seed=0, epoch=0, row=0)
    assert (sample["image"] == 200).all()


def test_dkd_of_mixed_images_is_the_mean_over_their_classes():
    student, teacher = torch.randn(2, 4, 6, dtype=torch.float64).unbind(0)
    first, second = torch.tensor([0, 1, 5, 2]), torch.tensor([3, 1, 0, 4])
    share = 0.3
    classes = [F.one_hot(one, 6).double() for one in (first, second)]
    shares_BK = share * classes[0] + (1 - share) * classes[1]
    by_hand = share * dkd_loss(student, teacher, first, 1.0, 8.0, 4.0)
    by_hand += (1 - share) * dkd_loss(student, teacher, second, 1.0, 8.0, 4.0)
    mixed = dkd_loss(student, teacher, shares_BK, 1.0, 8.0, 4.0)
    assert mixed.item() == pytest.approx(by_hand.item(), rel=1e-12)


# Mixed images


def test_mixup_blends_each_image_with_the_one_before_it():
    batch = random_batch(rows=6)
    mixed = Mixing(mixup=1.0, cutmix=0.0, num_classes=10)(batch, 3, CPU)
    before = (torch.arange(6) - 1) % 6
    images, labels = batch["image"].float(), F.one_hot(batch["label"], 10).float()
    share = (mixed["image"] - images[before])[0, 0, 0, 0] / (images - images[before])[0, 0, 0, 0]
    assert 0 < share < 1
    expected = share * images + (1 - share) * images[before]
    assert torch.allclose(mixed["image"], expected, atol=1e-3)
    expected_shares = share * labels + (1 - share) * labels[before]
    assert torch.allclose(mixed["shares"], expected_shares, atol=1e-5)
    assert torch.equal(mixed["label"], expected_shares.argmax(1))


def test_cutmix_pastes_a_box_whose_area_is_the_share_of_the_label():
    batch = random_batch(rows=4)
    mixed = Mixing(mixup=0.0, cutmix=1.0, num_classes=10)(batch, 1, CPU)
    pasted_HW = (mixed["image"] != batch["image"]).any(0).any(0)
    assert 0 < pasted_HW.sum() < 64
    share = 1 - pasted_HW.float().mean()
    labels = F.one_hot(batch["label"], 10).float()
    assert torch.allclose(mixed["shares"], share * labels + (1 - share) * labels.roll(1, 0))


def test_what_is_mixed_depends_on_the_seed_alone_and_leaves_the_generator():
    mixing = Mixing(mixup=0.4, cutmix=1.0, num_classes=10)
    state = torch.get_rng_state()
    first = mixing(random_batch(), 7, CPU)["image"]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(mixing(random_batch(), 7, CPU)["image"], first)
    assert not torch.equal(mixing(random_batch(), 8, CPU)["image"], first)


def seen_by(training: Training) -> dict[str, list[Tensor]]:
    """Return what teacher and student will be given."""
    assert training.teacher is not None
    seen: dict[str, list[Tensor]] = {"teacher": [], "student": []}
    models = {"teacher": training.teacher.model, "student": training.objective.student}
    for name, model in models.items():
        model.register_forward_pre_hook(
            lambda model, inputs, name=name: seen[name].append(inputs[0]) if model.training
            or name == "teacher" else None
        )  # fmt: skip
    return seen


def test_teacher_and_student_see_the_same_mixed_images():
    training = make_training(random_stream(2), method="dkd", mixup=0.4, cutmix=1.0, epochs=1)
    seen = seen_by(training)
    run_epoch(training)
    # the check before the first step, and two steps
    assert len(seen["teacher"]) == len(seen["student"]) == 3
    assert all(map(torch.equal, seen["teacher"], seen["student"]))
    plain = [training.normalise(batch["image"] / 255) for batch in training.stream.batches]
    assert not torch.allclose(seen["student"][1], plain[0])
    assert torch.equal(seen["student"][0], seen["student"][1])


def test_outputs_of_mixed_images_are_not_looked_up(digits: ImageTable):
    from test_teacher_lookup import KeptHere

    store = KeptHere()
    metrics = run_epoch(make_training(digits, method="kd", mixup=0.4, teacher_store=store))
    assert store.kept == {}
    assert "teacher_cached" not in metrics
    config = with_settings(Config(), {"teacher_cache_mb": 10, "mixup": 0.4})
    assert "no effect" in str(unused_cache(config))
    assert unused_cache(with_settings(config, {"mixup": 0.0})) is None


# Views


@pytest.mark.parametrize(
    "views",
    [Views(policy="randaugment"), Views(policy="trivial-augment"), Views(erase=1.0)],
    ids=["randaugment", "trivial", "erase"],
)
def test_views_depend_on_seed_epoch_and_row_alone(views: Views):
    transform = build_transform("crop", 16, train=True, views=views)
    plain = build_transform("crop", 16, train=True)
    image = torch.randint(1, 256, (3, 16, 16), dtype=torch.uint8)
    keys = [{"seed": 0, "epoch": epoch, "row": row} for epoch in range(6) for row in range(6)]
    state = torch.get_rng_state()
    changed = [transform(image, **key) for key in keys]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(transform(image, **key), one) for key, one in zip(keys, changed))
    assert {one.dtype for one in changed} == {torch.uint8}
    assert {one.shape for one in changed} == {(3, 16, 16)}
    # what precedes the views is as without them
    assert len({one.numpy().tobytes() for one in changed}) > 30
    assert sum(torch.equal(plain(image, **key), one) for key, one in zip(keys, changed)) < 12


def test_erased_boxes_are_black_and_as_frequent_as_told():
    views = Views(erase=0.3)
    image = torch.full((3, 16, 16), 200, dtype=torch.uint8)
    draw = random.Random(0)
    changed = [views(image, draw) for _ in range(400)]
    assert {*torch.stack(changed).unique().tolist()} == {0, 200}
    erased = sum(bool((one == 0).any()) for one in changed)
    assert 90 < erased < 150


def test_evaluation_images_are_not_changed():
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    views = Views(policy="randaugment", erase=1.0)
    transform = build_transform("crop", 16, train=False, views=views)
    assert torch.equal(transform(image, seed=0, epoch=0, row=0), image)


# The averaged student


def test_the_average_of_the_student_by_hand():
    training = make_training(random_stream(4), method="none", student="tiny", ema=0.75)
    expected: dict[str, Tensor] = {}
    for batch in training.stream.batches:
        training_step(training, batch)
        now = weights(training.objective.student)
        for name, value in now.items():
            old = expected.get(name, value)
            expected[name] = 0.75 * old + 0.25 * value
    averaged = weights(training.model)
    for name in [name for name in expected if "num_batches" not in name]:
        assert torch.allclose(averaged[name], expected[name], atol=1e-6), name
    assert not same(averaged, weights(training.objective.student))


def test_validation_and_checkpoint_are_of_the_average(tmp_path: Path):
    training = make_training(random_stream(), method="none", ema=0.9, epochs=1)
    metrics = run_epoch(training)
    save_checkpoint(tmp_path / "c.pt", training)
    kept = read_checkpoint(tmp_path / "c.pt")["student"]
    assert training.averaged is not None
    assert same(kept, training.averaged.module.state_dict())
    plain = make_training(random_stream(), method="none", epochs=1)
    plain.objective.student.load_state_dict(kept)
    assert evaluate(plain, "val")["loss"] == metrics["val_loss"]
    assert run_epoch(plain)["val_loss"] != metrics["val_loss"]


# Accumulation


def halves(batch: Batch) -> list[Batch]:
    parts = zip(*(value.chunk(2) for value in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


@pytest.mark.parametrize("settings", [{}, {"class_weights": "balanced", "label_smoothing": 0.1}])
def test_two_batches_step_as_one_of_twice_the_size(settings: dict[str, Any]):
    def training() -> Training:
        given = {"method": "kd", "student": "tiny-unnormalised", "clip_norm": 0.5}
        return make_training(random_stream(), **given, **settings)

    whole, parts = training(), training()
    for batch in random_stream(3).batches:
        training_step(whole, batch)
        optimiser_step(parts, halves(batch))
    first, second = weights(whole.objective.student), weights(parts.objective.student)
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    assert whole.schedule.last_epoch == parts.schedule.last_epoch == 3


def test_an_epoch_has_a_step_for_every_few_batches_and_one_for_the_rest():
    training = make_training(random_stream(5), method="none", accumulate=2, epochs=2, lr=0.2)
    run_epoch(training)
    assert training.schedule.last_epoch == 3
    assert training.progress == 0.5
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert curve(training)[-1]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_a_step_of_several_batches_is_measured_once(digits: ImageTable):
    training = make_training(digits, weights_unit="gradient", accumulate=2, gamma=0.0, epochs=1)
    units = training.objective.units
    assert units is not None
    run_epoch(training)
    assert units.state_dict()["steps"] == 2


# Patience


def test_patience_counts_the_epochs_since_the_best_score():
    patience = Patience(2, "accuracy")
    outcomes = []
    for score in (0.5, 0.6, 0.6, 0.7, 0.7, 0.65):
        patience.add(score)
        outcomes.append(patience.is_over)
    assert outcomes == [False] * 5 + [True]


def test_a_lower_loss_is_a_better_score():
    patience = Patience(1, "log-loss")
    patience.add(0.5)
    patience.add(0.4)
    assert not patience.is_over
    patience.add(0.6)
    assert patience.is_over


def test_a_run_stops_when_it_no_longer_improves():
    training = make_training(random_stream(2), method="none", lr=1e-30, epochs=9, patience=2)
    epochs = []
    while not training.is_over:
        epochs.append(run_epoch(training))
    assert len(epochs) == 3
    assert ["stopped_early" in metrics for metrics in epochs] == [False, False, True]


def test_a_resumed_run_waits_for_what_is_left_of_its_patience(tmp_path: Path):
    settings = {"method": "none", "lr": 1e-30, "epochs": 9, "patience": 3}
    stopped = make_training(random_stream(1), **settings)
    for _ in range(2):
        run_epoch(stopped)
    save_checkpoint(tmp_path / "c.pt", stopped)
    resumed = make_training(random_stream(1), **settings)
    restore(resumed, read_checkpoint(tmp_path / "c.pt"))
    while not resumed.is_over:
        run_epoch(resumed)
    assert resumed.epoch == 4


# The weight of the labels


def test_a_student_learns_from_the_teacher_alone():
    training = make_training(random_stream(), method="kd", task_weight=0.0, epochs=1)
    assert training.objective.term_weights == {"kd": 0.9}
    metrics = run_epoch(training)
    assert "loss_task" not in metrics
    assert metrics["train_loss"] == pytest.approx(0.9 * metrics["loss_kd"])


@pytest.mark.parametrize("method", ["graph", "logit-std", "kd"])
def test_the_weight_of_the_labels_can_be_set(method: str):
    training = make_training(random_stream(), method=method, task_weight=0.5)
    assert training.objective.term_weights["task"] == 0.5
    alone = make_training(random_stream(), method="none", task_weight=0.5)
    assert alone.objective.term_weights == {"task": 1.0}


def test_without_labels_a_weight_is_a_gradient_of_norm_1():
    training = make_training(
        random_stream(1), method="graph+dist", weights_unit="gradient", task_weight=0.0, gamma=0.0
    )
    metrics = run_epoch(training)
    for name, share in (("vertex", 100.0), ("edge", 10.0), ("dist", 1.0)):
        moved = metrics[f"factor_{name}"] * metrics[f"gradient_{name}"]
        assert moved == pytest.approx(share * WITHOUT_LABELS, rel=1e-6)


@pytest.mark.parametrize("method", ["graph", "at", "sp"])
def test_maps_alone_do_not_train_the_last_layer(method: str):
    with pytest.raises(ConfigError, match=f"--task-weight 0: --method {method} compares no class"):
        with_settings(Config(), {"method": method, "task_weight": 0.0})


# Settings


def test_a_search_can_draw_every_part():
    assert {*ALL_ON, "randaugment", "trivial_augment", "erase", "class_weights", "task_weight"} <= {
        *searchable()
    }


def test_the_logit_baseline_of_a_trial_has_its_recipe():
    assert logit_baseline({"mixup": 0.3, "alpha": 2.0, "ema": 0.9}) == {
        "mixup": 0.3,
        "ema": 0.9,
        "method": "kd",
        "kd_temperature": 4.0,
        "kd_weight": 0.9,
    }


def test_the_logit_baseline_of_a_trial_has_its_models_and_images():
    searched = {"student": "resnet14", "teacher": "resnet56", "image_size": 16, "augment": "crop"}
    assert searched.items() <= logit_baseline(searched | {"method": "graph"}).items()


def test_two_policies_are_refused():
    with pytest.raises(ConfigError, match="use only one of them"):
        with_settings(Config(), {"randaugment": True, "trivial_augment": True})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixup": 0.2, "cutmix": 1.0}, "--mixup, --cutmix: apply to classification only"),
        ({"label_smoothing": 0.1}, "--label-smoothing: applies to classification only"),
        ({"class_weights": "balanced"}, "--class-weights: applies"),
        ({"randaugment": True, "erase": 0.1}, "--randaugment, --erase: apply"),
        ({"task_weight": 0.0, "method": "none"}, "--task-weight: applies"),
    ],
)
def test_detectors_refuse_what_is_for_classifiers(settings: dict[str, Any], message: str):
    config = with_settings(Config(), {"dataset": "digits-voc", **settings})
    with pytest.raises(ConfigError, match=message):
        check_settings(config, "detection")


def test_detectors_take_the_rest():
    given = {"dataset": "digits-voc", "ema": 0.9, "accumulate": 2, "patience": 3}
    check_settings(with_settings(Config(), given), "detection")


# Resuming


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_with_all_parts_goes_on_as_one_without_a_break(
    digits: ImageTable, tmp_path: Path, steps: int
):
    def run() -> Training:
        return make_training(
            digits, student="tiny-dropout", method="dkd", batch_size=32, epochs=3, **ALL_ON
        )

    whole = run()
    expected = curve(whole)
    stopped = run()
    run_epoch(stopped)
    asked = iter([False] * (steps - 1) + [True])
    with pytest.raises(Stopped):
        run_epoch(stopped, lambda: next(asked))
    assert stopped.part is not None
    assert stopped.part.steps == 3 * steps
    save_checkpoint(tmp_path / "c.pt", stopped)
    resumed = run()
    restore(resumed, read_checkpoint(tmp_path / "c.pt"))
    assert curve(resumed) == expected[1:]
    assert same(weights(resumed.model), weights(whole.model))
    assert same(weights(resumed.objective), weights(whole.objective))
    assert resumed.patience is not None
    assert whole.patience is not None
    assert resumed.patience.state_dict() == whole.patience.state_dict()


# Named sets


def test_a_recipe_gives_other_defaults():
    for name, values in RECIPES.items():
        config = from_mapping({"recipe": {"recipe": name}})
        assert config.recipe.recipe == name
        changed = with_settings(Config(), values)
        recipe = {**to_mapping(changed)["recipe"], "recipe": name}
        assert to_mapping(config) == {**to_mapping(changed), "recipe": recipe}
    assert from_mapping({}) == from_mapping({"recipe": {"recipe": "standard"}})
    assert from_mapping({"recipe": {"recipe": "patient"}}).optim.epochs > Config().optim.epochs


def test_what_is_given_wins_over_the_recipe():
    given_too = {"epochs": 7, "batch_size": 16}
    config = from_mapping({"recipe": {"recipe": "quick"}, "optim": given_too})
    assert (config.optim.epochs, config.optim.batch_size) == (7, 16)
    config = resolve("train", None, {"recipe": "quick", "epochs": Config().optim.epochs}, None)[0]
    assert config.optim.epochs == Config().optim.epochs
    assert config.optim.batch_size == RECIPES["quick"]["batch_size"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_record_has_the_recipes_settings_and_its_name(recipe: str):
    config = from_mapping({"recipe": {"recipe": recipe}, "optim": {"lr": 0.3}})
    assert from_yaml(to_yaml(config), where="config.yaml") == config
    recorded = to_mapping(config)
    # a later version may have other settings under that name
    recorded["optim"]["epochs"] = 11
    assert from_mapping(recorded).optim.epochs == 11


def test_a_recipes_settings_are_not_given_and_its_name_is():
    config = from_mapping({"recipe": {"recipe": "quick"}, "optim": {"lr": 0.3}})
    assert given(config) == {"recipe", "lr"}
    assert given(from_mapping({"recipe": {"recipe": "standard"}})) == set()
    words = "raygkd train --dataset digits --lr 0.3 --recipe quick"
    assert command_line("train", config) == words


def test_recipes_are_for_classifiers():
    config = from_mapping({"data": {"dataset": "digits-voc"}, "recipe": {"recipe": "quick"}})
    with pytest.raises(ConfigError, match=r"^--recipe quick: is for classification only"):
        check_settings(config, "detection")


def test_a_recipe_is_not_searched(tmp_path: Path):
    (tmp_path / "space.yaml").write_text("recipe: {choice: [quick, patient]}")
    with pytest.raises(ConfigError, match="'recipe' cannot be searched") as raised:
        read_space(str(tmp_path / "space.yaml"))
    assert "\n" not in str(raised.value)


def test_a_teacher_is_the_same_under_another_name_of_its_settings(tmp_path: Path):
    images = open_images(DataConfig(limit_train=300), seed=0, output=tmp_path)
    named = from_mapping({"recipe": {"recipe": "quick"}})
    spelt = from_mapping({"optim": dict(RECIPES["quick"])})
    folders = {teacher_folder(config, images, tmp_path) for config in (named, spelt)}
    assert len(folders) == 1
    assert teacher_folder(Config(), images, tmp_path) not in folders


def test_help_and_guide_say_what_a_recipe_sets():
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "searching.md").read_text()
    text = option_settings()["recipe"][1].metadata["help"]()
    for name, values in RECIPES.items():
        assert f"{name}: {recipe_options(name) or 'the usual defaults'}" in text
        assert set(values) <= option_settings().keys()
        [row] = [line for line in guide.splitlines() if line.startswith(f"| `{name}` |")]
        assert (recipe_options(name) or "the usual defaults") in row.replace("`", "")
