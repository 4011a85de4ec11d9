"""Searches over several students and methods: their space, draws, early stopping and front."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from raygkd.assembly.models import untrained_file
from raygkd.config import Config, SearchConfig, with_settings
from raygkd.config.search_space import Dimension, default_space, in_space
from raygkd.data.spec import ImageSpec
from raygkd.deploy.costs import live_bytes, student_costs
from raygkd.errors import ConfigError
from raygkd.metrics.pareto import front
from raygkd.models import build_model, count_parameters
from raygkd.rayrun.search_history import History, SearchObserver, Trial
from raygkd.rayrun.searchers import ListedSettings, OfEachStudent, scheduler, searcher
from raygkd.storage.atomic_files import place as place_of
from raygkd.workflows.budgets import measured_costs, within_budget
from raygkd.workflows.candidates import (
    Candidate,
    candidates,
    first_of_all,
    joint_space,
    searched_choices,
    with_first_candidate,
)
from raygkd.workflows.search_forecast import Work, epochs_of_drawn

SPEC = ImageSpec(
    class_names=tuple("0123456789"), image_size=(16, 16), mean=(0.3,) * 3, std=(1,) * 3
)


def found_of(config: Config, space: tuple[Dimension, ...] | None = None) -> list[Candidate]:
    """Return the candidates of a search with untrained teachers."""
    choices = searched_choices(config, space)
    built = tuple(itertools.product(choices["student"], choices["image_size"]))
    teachers = {name: build_model(name, 10, SPEC.image_size) for name in choices["teacher"]}
    return candidates(config, choices, built, space, teachers, SPEC)


def search(**settings: Any) -> Config:
    """Return the settings of a search."""
    listed = {
        name: value.split(",") if name in ("students", "methods", "objective") else value
        for name, value in settings.items()
    }
    return with_first_candidate(with_settings(Config(), {"trials": 12, **listed}))


# The space


def test_one_student_and_one_method_have_their_default_space() -> None:
    config = search()
    [one] = found_of(config)
    assert one.decisive == {}
    expected = default_space("graph", {1: 16, 2: 32, 3: 64}, lr=config.optim.lr)
    assert joint_space([one], None, SPEC) == expected


def test_settings_of_a_method_are_drawn_with_it_alone() -> None:
    config = search(students="resnet8,resnet14", methods="graph,kd,dkd")
    space = joint_space(found_of(config), None, SPEC)
    names = [dimension.name for dimension in space]
    assert names[:2] == ["student", "method"]
    drawing = searcher(config, space)
    methods = set()
    for number in range(60):
        params = drawing.suggest(str(number))
        assert in_space(params, space)
        assert "lr" in params
        assert ("alpha" in params) == (params["method"] == "graph")
        assert ("kd_weight" in params) == (params["method"] == "kd")
        assert ("baseline_weight" in params) == (params["method"] == "dkd")
        methods.add((params["student"], params["method"]))
        # what is drawn can be trained
        with_settings(config, params)
    assert len(methods) == 6


def test_a_given_space_draws_what_the_drawn_method_reads() -> None:
    space = (
        Dimension("method", "choice", ("graph", "dkd")),
        Dimension("lr", "loguniform", (0.01, 0.1)),
        Dimension("alpha", "uniform", (1.0, 2.0)),
        Dimension("dkd.beta", "uniform", (1.0, 2.0)),
    )
    config = search()
    joint = joint_space(found_of(config, space), space, SPEC)
    drawing = searcher(config, joint)
    for number in range(20):
        params = drawing.suggest(str(number))
        own = "alpha" if params["method"] == "graph" else "dkd.beta"
        assert set(params) == {"method", "lr", own}


def test_a_method_beside_others_is_refused() -> None:
    with pytest.raises(ConfigError, match="--method kd: is not among --methods graph,dkd; omit"):
        searched_choices(search(methods="graph,dkd", method="kd"), None)
    both = searched_choices(search(methods="graph,dkd", method="dkd"), None)
    assert both["method"] == ("graph", "dkd")


def test_a_setting_of_no_searched_method_is_refused() -> None:
    space = (
        Dimension("method", "choice", ("graph", "kd")),
        Dimension("dkd.beta", "uniform", (1.0, 2.0)),
    )
    found = found_of(search(), space)
    with pytest.raises(ConfigError, match=r"dkd\.beta is a setting of no method that is searched"):
        joint_space(found, space, SPEC)


def test_students_of_other_widths_have_levels_of_their_own() -> None:
    config = search(students="resnet8,torchvision:squeezenet1_1", method="graph")
    config = with_settings(config, {"image_size": 64})
    spec = ImageSpec(
        class_names=SPEC.class_names, image_size=(64, 64), mean=SPEC.mean, std=SPEC.std
    )
    teacher = build_model("resnet20", 10, (64, 64))
    choices = searched_choices(config, None)
    config = with_settings(config, {"student_weights": "none"})
    built = [(student, None) for student in choices["student"]]
    found = candidates(config, choices, built, None, {"resnet20": teacher}, spec)
    space = joint_space(found, None, spec)
    drawing = searcher(config, space)
    for number in range(30):
        params = drawing.suggest(str(number))
        [own] = [one for one in found if one.config.model.student == params["student"]]
        assert set(params["levels"]) <= set(own.channels)


def test_a_cache_serves_students_that_learn_from_the_same_levels() -> None:
    assert len(found_of(search(students="resnet8,resnet14", teacher_cache_mb=64))) == 2
    config = search(students="resnet8,vgg8", teacher_cache_mb=64)
    with pytest.raises(ConfigError, match="--teacher-cache-mb: resnet8 and vgg8 learn from"):
        found_of(config)


def test_tpe_draws_within_the_space_and_repeats_its_draws() -> None:
    config = search(students="resnet8,resnet14", methods="graph,kd", searcher="tpe")
    space = joint_space(found_of(config), None, SPEC)
    first = first_of_all(config, found_of(config), space, "classification")

    def drawn() -> list[dict[str, Any]]:
        drawing = searcher(config, space, first)
        settings = []
        for number in range(60):
            params = drawing.suggest(str(number))
            settings.append(params)
            # larger learning rates are better
            drawing.on_trial_complete(str(number), {"val_score": params["lr"]})
        return settings

    settings = drawn()
    assert settings == drawn()
    assert all(in_space(params, space) for params in settings[len(first) :])
    rates = [params["lr"] for params in settings[len(first) :]]
    assert sum(rates[-20:]) > 1.2 * sum(rates[:20])


# Sizes, teachers and augmentations


def choice(**values: Any) -> tuple[Dimension, ...]:
    """Return a space of choices."""
    return tuple(Dimension(name, "choice", chosen) for name, chosen in values.items())


def test_images_are_prepared_for_the_largest_size_and_the_first_teacher() -> None:
    space = choice(
        image_size=(12, 16, 8), teacher=("resnet14", "resnet20"), augment=("crop", "none")
    )
    config = with_first_candidate(Config(), space)
    assert (config.data.image_size, config.data.augment) == (16, "crop")
    assert config.model.teacher == "resnet14"
    # what a resumed search has in its file is among them
    assert with_first_candidate(config, space) == config


def test_a_trial_has_the_size_and_the_teacher_of_its_draw() -> None:
    space = (
        *choice(
            student=("resnet8", "resnet14"), image_size=(8, 16), teacher=("resnet14", "resnet20")
        ),
        Dimension("lr", "loguniform", (0.01, 0.1)),
    )
    config = with_first_candidate(search(), space)
    found = found_of(config, space)
    assert len(found) == 8
    for one in found:
        assert one.spec.image_size == (one.decisive["image_size"],) * 2
        assert one.spec.view == one.spec.of_teacher().image_size == (16, 16)
    joint = joint_space(found, space, SPEC)
    drawing = searcher(config, joint)
    drawn = [drawing.suggest(str(number)) for number in range(60)]
    assert all(in_space(params, joint) for params in drawn)
    assert len({(one["student"], one["image_size"], one["teacher"]) for one in drawn}) == 8
    first = first_of_all(config, found, joint, "classification")
    # no student has more trials of the default settings than before
    assert [one["student"] for one in first[:2]] == ["resnet8", "resnet14"]
    assert all(one["method"] == "kd" for one in first[2:])
    assert len({one["teacher"] for one in first}) == 2


def test_a_size_beyond_the_budget_is_not_drawn_for_that_student() -> None:
    space = choice(student=("resnet8", "resnet14"), image_size=(8, 16))
    config = with_first_candidate(search(), space)
    choices = searched_choices(config, space)
    built = (("resnet8", 8), ("resnet8", 16), ("resnet14", 8))
    teachers = {"resnet20": build_model("resnet20", 10, SPEC.image_size)}
    found = candidates(config, choices, built, space, teachers, SPEC)
    joint = joint_space(found, space, SPEC)
    drawing = searcher(config, joint)
    drawn = [drawing.suggest(str(number)) for number in range(40)]
    assert {(one["student"], one["image_size"]) for one in drawn} == set(built)


def test_a_setting_names_no_case_that_does_not_matter() -> None:
    space = (
        *choice(student=("resnet8", "resnet14"), method=("graph", "kd"), image_size=(8, 16)),
        Dimension("alpha", "uniform", (1.0, 2.0)),
    )
    config = with_first_candidate(search(), space)
    joint = joint_space(found_of(config, space), space, SPEC)
    [alpha] = [one for one in joint if one.name == "alpha"]
    assert alpha.when == ((("method", "graph"),),)
    assert all(not one.when for one in joint if one.name != "alpha")


def test_costs_belong_to_a_student_at_a_size() -> None:
    config = search(objective="score,mflops")
    costs = measured_costs(config, (("resnet8", 8), ("resnet8", 16)), SPEC)
    assert costs["resnet8", 16]["params"] == costs["resnet8", 8]["params"]
    assert costs["resnet8", 16]["mflops"] > 3.9 * costs["resnet8", 8]["mflops"]


@pytest.mark.parametrize(
    ("settings", "searched", "message"),
    [
        ({"image_size": 12}, {"image_size": (8, 16)}, "--image-size 12: is not among the search"),
        ({"augment": "none"}, {"augment": ("crop",)}, "--augment none: is not among the search"),
        ({"teacher": "resnet8"}, {"teacher": ("resnet14",)}, "--teacher resnet8: is not among"),
        ({}, {"image_size": (8, None)}, "image_size: must be numbers of pixels, not null"),
        ({}, {"augment": ("auto", "none")}, "augment: auto is one of the others; name it"),
        ({}, {"augment": ("crop", "resized-crop")}, "resized-crop cuts the validation images"),
        (
            {"teacher_weights": "w.pth"},
            {"teacher": ("resnet14", "resnet20")},
            "--teacher-weights w.pth: fits one teacher, not 2",
        ),
        (
            {},
            {"teacher": ("resnet14", "timm:vit_tiny_patch16_224")},
            r"the input sizes differ \(resnet14 that of the student, .* 224 pixels\)",
        ),
        (
            {"dataset": "unlabelled", "method": "kd"},
            {"teacher": ("resnet14", "resnet20")},
            "teacher: without labels a trial is scored by its likeness to its teacher",
        ),
    ],
)
def test_what_trials_could_not_share_is_refused(
    settings: dict[str, Any], searched: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        with_first_candidate(with_settings(Config(), settings), choice(**searched))


def test_tpe_with_several_aims_draws_towards_the_front_and_repeats_its_draws() -> None:
    config = search(searcher="tpe", objective="score,params")
    space = (*choice(student=("small", "large", "poor")), Dimension("lr", "uniform", (0.0, 1.0)))
    costs = {"small": 1.0, "large": 3.0, "poor": 3.0}
    scores = {"small": 0.5, "large": 0.9, "poor": 0.2}

    def drawn(objective: bool) -> list[dict[str, Any]]:
        costs_of = (lambda params: [costs[params["student"]]]) if objective else None
        first = [{"student": "small", "lr": 0.5}]
        drawing = searcher(config, space, first, costs_of)
        settings = []
        for number in range(80):
            params = drawing.suggest(str(number))
            settings.append(params)
            score = scores[params["student"]] - 0.1 * abs(params["lr"] - 0.7)
            drawing.on_trial_complete(str(number), {"val_score": score})
        return settings

    settings = drawn(True)
    assert settings == drawn(True)
    late = Counter(params["student"] for params in settings[-40:])
    assert late["poor"] < late["small"]
    assert late["small"] > 10
    # with the score alone there is no use for a small one
    assert Counter(params["student"] for params in drawn(False)[-40:])["small"] < late["small"]


# The time that a search takes


@pytest.mark.parametrize("students", [1, 3])
def test_asha_trains_about_as_many_epochs_as_expected(tmp_path: Path, students: int) -> None:
    config = search(epochs=27, trials=300, reduction_factor=3)
    draws = np.random.default_rng(0)
    settings = [{"student": f"s{number % students}"} for number in range(300)]
    space = choice(student=tuple(f"s{number}" for number in range(students)))
    history = History(
        place_of(str(tmp_path / "trials.jsonl")),
        ListedSettings(settings),
        scheduler(config, space),
        trials=300,
        epochs=27,
        seed=0,
        observer=SearchObserver(),
        spared=4,
    )
    while history.left:
        trial, quality = history.begin(), float(draws.random())
        while not trial.is_over:
            history.report(trial, {"epoch": trial.epoch + 1, "val_score": quality, "diverged": 0})
    work = Work(
        trials=300,
        epochs=27,
        spared=4,
        drawn=epochs_of_drawn(config.search, 27, 4, students),
        concurrent=2,
    )
    trained = sum(trial.epoch for trial in history.trials)
    # from one order of the trials to another it varies by a fifth
    assert work.expected() == pytest.approx(trained, rel=0.4)
    assert work.left({trial.number: trial for trial in history.trials}) == 0


def test_the_estimate_says_what_is_measured_and_what_is_not() -> None:
    work = Work(trials=10, epochs=9, spared=1, drawn=3.0, concurrent=2)
    told = "estimate: 10 trials of at most 9 epochs, 2 at a time; ASHA is expected to train about "
    assert work.line([]) == f"{told}36 of 90 epochs (40%); the time follows after the first epoch"
    trial = Trial(number=0, params={}, epochs=[{"epoch": 1.0, "epoch_seconds": 10.0}])
    assert work.line([trial]) == (
        f"{told}36 of 90 epochs (40%); at 10 s an epoch, measured in the first epoch: about 3 min"
    )
    assert work.left({0: trial}) == 8 + 9 * 3
    ahead = Trial(number=1, params={}, epochs=[{"epoch": 4.0}])
    assert work.left({0: trial, 1: ahead}) == 8 + 5 + 8 * 3
    # of two trials at a time, each epoch takes 10 s
    assert work.seconds_left({0: trial, 1: ahead}) == 10 * (8 + 5 + 8 * 3) / 2
    assert work.seconds_left({1: ahead}) is None
    for scheduler_name in ("hyperband", "none"):
        assert epochs_of_drawn(SearchConfig(scheduler=scheduler_name), 27) == 27


# The first trials


def test_each_student_starts_with_the_defaults_then_kd() -> None:
    config = search(students="resnet8,resnet14", trials=6)
    found = found_of(config)
    space = joint_space(found, None, SPEC)
    first = first_of_all(config, found, space, "classification")
    shown = [(one["student"], one.get("method", "graph"), one.get("alpha")) for one in first]
    assert shown == [
        ("resnet8", "graph", 3.0),
        ("resnet14", "graph", 3.0),
        ("resnet8", "kd", None),
        ("resnet14", "kd", None),
    ]
    few = first_of_all(with_settings(config, {"trials": 5}), found, space, "classification")
    assert few == first[:2]


# Early stopping


def test_trials_are_stopped_behind_others_of_the_same_student_only() -> None:
    config = search(students="resnet8,resnet14", epochs=9, reduction_factor=3)
    scheduler = OfEachStudent(config)
    trials = [
        SimpleNamespace(trial_id=str(number), params={"student": student})
        for number, student in enumerate(["resnet14"] * 3 + ["resnet8"] * 3)
    ]
    for trial in trials:
        scheduler.on_trial_add(None, trial)
    # all of the small student's scores are below all of the large one's
    scores = [0.9, 0.8, 0.7, 0.3, 0.2, 0.1]
    decisions = [
        scheduler.on_trial_result(None, trial, {"epoch": 1, "val_score": score})
        for trial, score in zip(trials, scores, strict=True)
    ]
    assert decisions[:3] == decisions[3:]
    assert decisions[0] == "CONTINUE"
    assert "STOP" in decisions[:3]


# Budgets


def test_costs_are_those_of_the_model() -> None:
    files = {name: untrained_file(name, SPEC) for name in ("resnet8", "resnet14")}
    costs = student_costs(files, ("latency",), threads=1)
    for name, one in costs.items():
        parameters = count_parameters(build_model(name, 10, (16, 16)))
        assert one["params"] == parameters
        assert one["mb"] == pytest.approx(4e-6 * parameters)
        assert one["latency"] > 0
        # an image, and at least the maps of a residual block, beside the weights
        of_block = 4 * 16 * 16 * 16
        assert one["memory"] == pytest.approx(one["mb"], abs=0.3)
        assert one["memory"] > one["mb"] + 2 * of_block / 1e6
    # three 3x3 convolutions of 16 x 16 pixels with 16 channels: the stem has 3
    stem_and_block = 2 * 16 * 16 * 9 * (3 * 16 + 2 * 16 * 16) / 1e6
    assert costs["resnet8"]["mflops"] > stem_and_block
    assert costs["resnet14"]["mflops"] > 1.9 * costs["resnet8"]["mflops"]


def test_costs_in_8_bits_are_those_of_the_exported_file() -> None:
    files = {"resnet14": untrained_file("resnet14", SPEC)}
    [costs] = student_costs(files, ("int8_mb", "int8_latency"), threads=1).values()
    assert "latency" not in costs
    # a byte for a weight, and the graph
    assert costs["params"] / 1e6 < costs["int8_mb"] < 0.5 * costs["mb"]
    assert costs["int8_latency"] > 0


def test_limits_and_aims_are_of_the_model_in_8_bits() -> None:
    settings = {"budget_of": "int8", "students": "resnet8,resnet14", "max_mb": 0.2}
    config = search(**settings, objective="score,mb,params")
    assert config.search.limits == {"int8_mb": ("max_mb", 0.2)}
    assert config.search.aims == ("int8_mb", "params")
    built = (("resnet8", None), ("resnet14", None))
    costs = measured_costs(config, built, SPEC)
    # in float neither is that small
    assert all(one["mb"] > 0.2 for one in costs.values())
    console = Console(record=True, width=200)
    assert within_budget(config, built, costs, console) == built[:1]
    told = console.export_text()
    assert "not trained: resnet14: 0.2" in told
    assert "MB in 8 bits (--max-mb 0.2)" in told


def test_memory_is_that_of_the_maps_that_are_alive_together() -> None:
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1), nn.Flatten(), nn.Linear(32, 5)]
    image = torch.zeros(1, 3, 4, 4)
    # most are alive as the second layer reads the map of the first, while the image is held
    assert live_bytes(nn.Sequential(*layers), image) == 4 * 16 * (3 + 8 + 8)

    # a branch keeps a map alive while the other one runs
    class Branch(nn.Module):
        def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
            return x_BCHW.relu().relu().relu() + x_BCHW

    assert live_bytes(Branch(), image) == 4 * 16 * (3 + 3 + 3)


def test_a_memory_limit_leaves_students_out() -> None:
    config = search(max_memory_mb=0.5)
    built = (("resnet8", None), ("resnet14", None))
    costs = measured_costs(config, built, SPEC)
    console = Console(record=True, width=200)
    assert within_budget(config, built, costs, console) == built[:1]
    told = console.export_text()
    assert "not trained: resnet14: 0.7" in told
    assert "MB of memory (--max-memory-mb 0.5)" in told


def test_students_beyond_a_limit_are_named_and_left_out() -> None:
    costs = {("resnet8", None): {"params": 78_042.0}, ("resnet20", None): {"params": 272_474.0}}
    config = search(students="resnet8,resnet20", max_params=100_000)
    console = Console(record=True, width=200)
    assert within_budget(config, tuple(costs), costs, console) == (("resnet8", None),)
    told = "not trained: resnet20: 272,474 parameters (--max-params 100,000)"
    assert told in console.export_text()
    with pytest.raises(ConfigError, match=r"the nearest is resnet8: 78,042 parameters"):
        within_budget(with_settings(config, {"max_params": 100}), tuple(costs), costs, console)


# The front


def test_the_front_is_that_of_brute_force() -> None:
    draws = random.Random(0)
    for _ in range(200):
        points = [[draws.randint(0, 4) for _ in range(3)] for _ in range(draws.randint(1, 9))]
        beaten = set()
        for (place, point), (_, rival) in itertools.permutations(enumerate(points), 2):
            if all(b >= a for a, b in zip(point, rival)) and rival != point:
                beaten.add(place)
        assert front(points) == [n for n in range(len(points)) if n not in beaten]


# Mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student": "resnet20", "students": "resnet8"}, "--student resnet20: is not among"),
        (
            {"students": "resnet8,resnet14", "student_weights": "w.pth"},
            "--student-weights w.pth: fits one student, not 2",
        ),
        ({"students": "resnet8,resnet8"}, "--students 'resnet8,resnet8': must be different"),
        ({"objective": "latency,latency"}, "--objective 'latency,latency': must be different"),
        ({"max_mb": 0.0}, "--max-mb 0.0: must be above 0"),
    ],
)
def test_wrong_choices_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(**settings)


def test_the_student_alone_is_no_method_to_choose() -> None:
    with pytest.raises(ConfigError, match="--methods: none is the student alone"):
        searched_choices(search(methods="graph,none"), None)


def test_without_labels_feature_maps_and_classes_are_not_compared() -> None:
    with pytest.raises(ConfigError, match="--methods graph,kd: without labels some of them teach"):
        search(dataset="unlabelled", methods="graph,kd")
    assert search(dataset="unlabelled", methods="kd,dist").method.method == "kd"
