"""The configuration: YAML in and out, types, limits, and errors; and the registry of names."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from raygkd.assembly.derived_configs import (
    logit_baseline,
    student_alone,
    teacher_alone,
    teacher_training,
)
from raygkd.assembly.methods import uses_teacher
from raygkd.assembly.student_objective import baseline_settings
from raygkd.config import (
    SECTIONS,
    Config,
    LevelPair,
    WorkerRange,
    allowed_choices,
    base_type,
    check_keys,
    coerce_text,
    fingerprint,
    flag,
    from_mapping,
    from_yaml,
    given,
    option_settings,
    settings,
    text_of,
    to_mapping,
    to_yaml,
    value_of,
    with_settings,
)
from raygkd.errors import ConfigError
from raygkd.registry import METHODS, Registry, own_settings


def problems(tree: dict[str, Any]) -> list[str]:
    """Return the lines of the error that a tree of settings gives."""
    with pytest.raises(ConfigError) as raised:
        from_mapping(tree, where="run.yaml")
    return str(raised.value).splitlines()


# In and out


def test_pairs_of_levels_in_yaml_are_no_numbers_to_base_60():
    config = from_yaml("method: {levels: [1:2, 3, 2:4]}", where="run.yaml")
    assert config.method.levels == (LevelPair(1, 2), LevelPair(3), LevelPair(2, 4))


def test_yaml_round_trip_gives_an_equal_configuration():
    changed = with_settings(
        Config(),
        {
            "dataset": "imagefolder",
            "data_dir": "/data/größe: 'x'",
            "download": True,
            "limit_train": 100,
            "workers": "1-4",
            "levels": [1, 3],
            "lr": 5e-4,
            "weight_decay": 1e-12,
            "milestones": [0.25, 0.5],
            "clip_norm": 1.0,
            "seed": 2**32 - 1,
            "experiment": "no",
        },
    )
    for config in (Config(), changed):
        assert from_yaml(to_yaml(config), where="run.yaml") == config
        assert from_mapping(to_mapping(config)) == config
    assert changed.method.levels == (LevelPair(1), LevelPair(3))
    assert changed.cluster.workers == WorkerRange(1, 4)
    assert changed.optim.milestones == (0.25, 0.5)


def test_what_is_left_out_has_its_default():
    assert from_yaml("", where="run.yaml") == Config()
    config = from_yaml("optim: {lr: 0.3}", where="run.yaml")
    assert config == with_settings(Config(), {"lr": 0.3})


def test_every_setting_has_a_name_of_its_own():
    leaves = [leaf for cls in SECTIONS.values() for leaf in dataclasses.fields(cls)]
    names = [leaf.name for leaf in leaves if leaf.metadata]
    assert len(names) == len(set(names)) == len(option_settings())
    assert list(SECTIONS) == [leaf.name for leaf in dataclasses.fields(Config)]


def test_configuration_and_its_sections_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().optim = None  # type: ignore[misc]
    for cls in SECTIONS.values():
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(cls(), dataclasses.fields(cls)[0].name, None)


def test_fingerprint_depends_on_values_and_not_on_their_order():
    tree = to_mapping(Config())
    digits = fingerprint(tree)
    assert len(digits) == 16
    assert fingerprint(dict(reversed(tree.items()))) == digits
    tree["optim"]["lr"] = 0.051
    assert fingerprint(tree) != digits


# Names


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"optim": {"lrr": 8}}, "run.yaml: unknown key 'optim.lrr'; did you mean 'lr'"),
        ({"optmi": {"lr": 0.1}}, "run.yaml: unknown key 'optmi'; did you mean 'optim'"),
        ({"lr": 0.1}, "run.yaml: unknown key 'lr' (it belongs under 'optim:')"),
        (
            {"data": {"lr": 0.1}},
            "run.yaml: unknown key 'data.lr' (it belongs under 'optim:'; 'data' takes dataset,",
        ),
        (
            {"method": {"kind": "kd"}},
            "run.yaml: unknown key 'method.kind' ('method' takes method, levels, temperature, dim",
        ),
        ({"optim": None}, "run.yaml: 'optim' must contain settings, not None"),
        ({1: {}}, "run.yaml: unknown key 1"),
    ],
)  # fmt: skip
def test_wrong_keys_name_the_near_ones(tree: dict[Any, Any], message: str):
    (line,) = problems(tree)
    assert line.startswith(message)
    with pytest.raises(ConfigError) as raised:
        check_keys(tree, where="run.yaml")
    assert str(raised.value) == line


def test_all_problems_come_in_one_error_a_line_each():
    lines = problems(
        {
            "optim": {"lrr": 1, "epochs": "ten", "momentum": 1.5, "amp": "bf61"},
            "method": {"levels": 3},
            "clutser": {},
        }
    )
    assert len(lines) == 6
    assert [line.partition(" ")[0] for line in lines].count("run.yaml:") == 4
    for part in ("'optim.lrr'", "'clutser'", "--epochs", "--levels", "--momentum 1.5", "--amp"):
        assert any(part in line for line in lines), part


def test_values_and_what_they_make_together_are_told_at_once():
    lines = problems(
        {"optim": {"lr": -1, "batch_size": 9}, "cluster": {"workers": 2}, "data": {"cache_mb": -1}}
    )
    assert lines == [
        "--cache-mb -1: must be at least 0",
        "--lr -1.0: must be above 0",
        "--batch-size 9 cannot be split evenly over --workers 2; use a multiple",
    ]


def test_a_refused_value_brings_no_problem_with_a_default():
    """The default of 10 epochs must not be held against the grace period."""
    lines = problems({"optim": {"epochs": "fifty"}, "search": {"grace_period": 20}})
    assert lines == ["run.yaml: --epochs 'fifty': must be a whole number"]


# Types


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("lr", "5e-4", 5e-4),
        ("lr", 1, 1.0),
        ("clip_norm", None, None),
        ("clip_norm", "1e1", 10.0),
        ("levels", [1, 2], (LevelPair(1), LevelPair(2))),
        ("levels", (2, "4:3"), (LevelPair(2), LevelPair(4, 3))),
        ("levels", (LevelPair(2),), (LevelPair(2),)),
        ("levels", None, None),
        ("milestones", ["5e-1", 0.75], (0.5, 0.75)),
        ("compile", True, True),
        ("epochs", 3, 3),
    ],
)
def test_values_take_the_type_of_their_setting(name: str, given: Any, value: Any):
    config = with_settings(Config(), {name: given})
    found = value_of(config, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("epochs", True, "a whole number"),
        ("epochs", 3.0, "a whole number"),
        ("epochs", "3", "a whole number"),
        ("epochs", None, "a whole number"),
        ("lr", True, "a number"),
        ("lr", "fast", "a number"),
        ("lr", [0.1], "a number"),
        ("compile", 1, "true or false"),
        ("compile", "yes", "true or false"),
        ("dataset", 5, "a string"),
        ("dataset", None, "a string"),
        ("levels", 3, "a list of levels"),
        ("levels", "1,2", "a list of levels"),
        ("levels", [1, "a"], "levels such as 1,2, or pairs student:teacher such as 1:2,2:4"),
        ("levels", ["1:2:3"], "levels such as 1,2, or pairs student:teacher such as 1:2,2:4"),
        ("levels", [True], "levels such as 1,2, or pairs student:teacher such as 1:2,2:4"),
        ("milestones", 0.5, "a list of numbers"),
        *[
            ("workers", value, "a number, or a range such as 1-4")
            for value in ("1-", "two", 1.5, True)
        ],
    ],
)
def test_value_of_another_type_is_refused(name: str, value: Any, wanted: str):
    with pytest.raises(ConfigError) as raised:
        with_settings(Config(), {name: value})
    assert str(raised.value).endswith(f"must be {wanted}")
    assert flag(name) in str(raised.value)


# Limits


def limits() -> Iterator[tuple[str, float, str]]:
    """Yield name, a value just beyond a limit, and how the error calls the limit."""
    words = {"minimum": "at least", "above": "above", "maximum": "at most", "below": "below"}
    for name, (_, leaf, kind) in settings().items():
        whole = kind in (int, WorkerRange) or int in getattr(kind, "__args__", ())
        for limit, bound in leaf.metadata["limits"].items():
            if bound is not None:
                step = 0 if limit in ("above", "below") else 1 if whole else 1e-9
                beyond = bound - step if limit in ("minimum", "above") else bound + step
                yield name, beyond, f"{words[limit]} {bound:.10g}"


def test_every_number_is_limited_from_below():
    """But for lists, which have checks of their own."""
    free = [
        name
        for name, (_, leaf, kind) in settings().items()
        if kind in (int, float, int | None, float | None)
        and leaf.metadata["limits"]["minimum"] is leaf.metadata["limits"]["above"] is None
    ]
    assert free == []


@pytest.mark.parametrize(("name", "value", "allowed"), list(limits()))
def test_value_beyond_a_limit_is_refused(name: str, value: float, allowed: str):
    with pytest.raises(ConfigError) as raised:
        with_settings(Config(), {name: value})
    first = str(raised.value).splitlines()[0]
    assert first.startswith(f"{flag(name)} {value}: must be ")
    assert allowed in first


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kd_weight", 1.0),
        ("momentum", 0.0),
        ("beta", 0.0),
        ("image_size", 4),
        ("teacher_cache_mb", 0),
    ],
)
def test_value_on_an_inclusive_limit_is_allowed(name: str, value: float):
    with_settings(Config(), {name: value})


def test_limits_on_both_sides_are_told_together():
    with pytest.raises(ConfigError, match=r"^--momentum 1.0: must be at least 0 and below 1$"):
        with_settings(Config(), {"momentum": 1.0})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "nan"])
def test_number_that_is_not_finite_is_refused(value: float | str):
    with pytest.raises(ConfigError, match=r"^--lr .*: must be a finite number$"):
        with_settings(Config(), {"lr": value})


@pytest.mark.parametrize(
    "name", [name for name, (_, leaf, _) in settings().items() if allowed_choices(leaf)]
)
def test_choice_that_is_not_offered_is_refused_with_the_offered_ones(name: str):
    _, leaf, kind = settings()[name]
    choices = allowed_choices(leaf)

    def value(choice: str) -> Any:
        return choice if base_type(kind) is str else [choice]

    with pytest.raises(ConfigError) as raised:
        with_settings(Config(), {name: value(choices[-1] + "x")})
    message = str(raised.value)
    assert message.startswith(f"{flag(name)} '{choices[-1]}x': must be one of {', '.join(choices)}")
    assert f"did you mean '{choices[-1]}'" in message
    for choice in choices:
        with_settings(Config(), {name: value(choice)})


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ({"methods": ["kd", "at", "kd"]}, "--methods 'kd,at,kd': must be different methods"),
        ({"methods": []}, "--methods '': must be different methods"),
        (
            {"methods": ["kd"], "preset": "ablation"},
            "--methods kd: --preset ablation sets its own methods; use only one of them",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(compare: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as raised:
        with_settings(Config(), compare)
    assert str(raised.value) == message


def test_every_default_and_every_setting_is_described():
    for leaf in (leaf for _, leaf, _ in settings().values()):
        assert leaf.metadata["help"], leaf.name


# Between settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"levels": []}, "--levels '': must be different whole numbers from 1"),
        ({"levels": [1, 1]}, "--levels '1,1': must be different whole numbers from 1"),
        ({"levels": ["1:2", "3:2"]}, "--levels '1:2,3:2': must be different whole numbers from 1"),
        ({"levels": ["1:0"]}, "--levels '1:0': must be different whole numbers from 1"),
        ({"levels": [0, 1]}, "--levels '0,1': must be different whole numbers from 1"),
        (
            {"batch_size": 64, "workers": 3},
            "--batch-size 64 cannot be split evenly over --workers 3; use a multiple",
        ),
        (
            {"tracking_uri": "https://me:secret@host:5000"},
            "--tracking-uri: contains a password, which would be stored with the run; set "
            "MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        ),
        ({"workers": 0}, "--workers 0: must be at least 1"),
        ({"workers": "0-2"}, "--workers 0-2: must be at least 1"),
        ({"workers": "2-1"}, "--workers 2-1: the first number must not be larger than the second"),
        (
            {"batch_size": 64, "workers": "2-6"},
            "--batch-size 64 cannot be split evenly over --workers 2-6; use a multiple",
        ),
        ({"warmup_epochs": 10.0}, "--warmup-epochs 10.0: must be below --epochs 10"),
        ({"grace_period": 11}, "--grace-period 11: must be at most --epochs 10"),
        (
            {"seed": 2**32 - 3, "repeat": 3},
            "--repeat 3: uses the seeds after --seed 4294967293, but the largest allowed seed is "
            "4294967295; lower one of them",
        ),
        ({"milestones": [0.5, 1.0]}, "--milestones 0.5,1.0: must lie between 0 and 1"),
        (
            {"alpha": 0, "beta": 0, "gamma": 0, "method": "graph+kd"},
            "--method graph+kd with --alpha, --beta and --gamma all 0 matches no graphs; raise "
            "one of them, or use --method none",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as raised:
        with_settings(Config(), values)
    assert str(raised.value) == message


def test_weights_may_all_be_zero_where_no_graph_is_distilled():
    with_settings(Config(), {"alpha": 0, "beta": 0, "gamma": 0, "method": "kd"})


# Settings of registered methods


def test_settings_of_methods_are_given_back_and_named_by_their_method():
    config = from_mapping({"method": {"dkd": {"beta": 3}}})
    assert config.method.own == {"dkd.beta": 3.0}
    assert config == with_settings(Config(), {"dkd.beta": 3})
    assert from_yaml(to_yaml(config), where="run.yaml") == config
    assert to_mapping(config)["method"]["dkd"] == {"beta": 3.0}
    assert given(config) == {"dkd.beta"}
    assert (value_of(config, "dkd.beta"), value_of(config, "dkd.alpha")) == (3.0, 1.0)
    assert baseline_settings(config, "dkd") == {"beta": 3.0, "temperature": 4.0}


def test_settings_with_an_option_of_their_own_have_two_names():
    config = from_mapping({"method": {"graph": {"alpha": 3, "levels": [1]}, "dkd.temperature": 2}})
    assert config == with_settings(Config(), {"alpha": 3, "levels": [1], "kd_temperature": 2})
    assert config == with_settings(Config(), {"graph.alpha": 3, "levels": [1], "kd.temperature": 2})
    assert baseline_settings(config, "kd") == {"temperature": 2.0}
    with pytest.raises(ConfigError, match=r"^graph.alpha and alpha are the same setting"):
        from_mapping({"method": {"alpha": 3, "graph": {"alpha": 3}}})


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({"dkd": {"bta": 1}}, "unknown key 'method.dkd.bta'; did you mean 'dkd.beta'"),
        ({"dkd": {"beta": "much"}}, "--set dkd.beta 'much': must be a number"),
        ({"dkd": {"beta": -1}}, "--set dkd.beta -1.0: must be at least 0"),
        ({"dkd": 3}, "unknown key 'method.dkd'"),
    ],
)
def test_wrong_settings_of_methods_are_refused(leaves: dict[str, Any], message: str):
    (line,) = problems({"method": leaves})
    assert message in line


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (float, "8", 8.0),
        (int, "8", 8),
        (bool, "true", True),
        (str, "none", "none"),
        (float | None, "none", None),
        (tuple[int, ...], "1,2", (1, 2)),
    ],
)
def test_texts_take_the_type_of_their_setting(kind: Any, text: str, value: Any):
    found = coerce_text("a.b", kind, text)
    assert (found, type(found)) == (value, type(value))
    assert value is None or coerce_text("a.b", kind, text_of(value)) == value


@pytest.mark.parametrize(("kind", "text"), [(float, "x"), (int, "1.5"), (bool, "yes")])
def test_texts_of_another_type_are_refused(kind: Any, text: str):
    with pytest.raises(ConfigError, match=f"^--set a.b '{text}': must be"):
        coerce_text("a.b", kind, text)


# Changing settings


def test_with_settings_replaces_the_named_and_leaves_the_rest():
    config = Config()
    changed = with_settings(config, {"lr": 0.2, "student": "wrn_16_2"})
    expected = to_mapping(config)
    expected["optim"]["lr"] = 0.2
    expected["model"]["student"] = "wrn_16_2"
    assert to_mapping(changed) == expected
    assert config == Config()


def test_with_settings_names_unknown_settings():
    with pytest.raises(ConfigError) as raised:
        with_settings(Config(), {"temprature": 1.0, "gama": 1.0})
    first, second = str(raised.value).splitlines()
    assert first.startswith("unknown setting 'temprature'; did you mean 'temperature'")
    assert second.startswith("unknown setting 'gama'; did you mean 'gamma'")


def test_teacher_is_trained_as_a_student_of_the_labels_alone():
    config = with_settings(
        Config(), {"epochs": 30, "grace_period": 25, "levels": [1], "teacher_epochs": 5}
    )
    teacher = teacher_training(config)
    assert teacher.model.student == config.model.teacher
    assert (teacher.method.method, teacher.optim.epochs) == ("none", 5)


def test_student_alone_is_the_trial_without_its_teacher():
    config = with_settings(Config(), {"epochs": 30, "method": "graph+kd", "inherit": True})
    params = {"lr": 0.2, "weight_decay": 1e-3, "alpha": 0.5}
    alone = student_alone(config, params)
    assert alone == with_settings(config, {**params, "method": "none", "inherit": False})
    assert uses_teacher(config)
    assert not uses_teacher(alone)


def test_logit_baseline_has_the_optimiser_of_the_trial_and_the_defaults_of_logit_distillation():
    config = with_settings(Config(), {"method": "graph+kd", "epochs": 30, "kd_weight": 0.3})
    params = {"lr": 0.2, "weight_decay": 1e-3, "levels": [2], "alpha": 0.5, "kd_temperature": 2.0}
    baseline = with_settings(config, logit_baseline(params))
    assert baseline == with_settings(
        config,
        {"lr": 0.2, "weight_decay": 1e-3, "method": "kd", "kd_temperature": 4.0, "kd_weight": 0.9},
    )


def test_a_student_that_inherits_needs_a_teacher_whatever_it_learns_from():
    config = with_settings(Config(), {"method": "none", "inherit": True})
    assert uses_teacher(config)
    assert not uses_teacher(teacher_alone(config))


def test_what_is_given_is_what_differs_from_the_defaults_of_the_data_set():
    plain = from_mapping({"data": {"dataset": "voc"}})
    assert given(plain) - {"dataset"} == set()
    changed = with_settings(plain, {"alpha": 0.7, "levels": [3], "lr": plain.optim.lr})
    assert given(changed) - {"dataset"} == {"alpha", "levels"}


@pytest.mark.parametrize(
    "command", [{"student": "retinanet_resnet18_fpn64"}, {"teacher": "fcos_resnet50_fpn"}]
)
def test_detectors_have_their_defaults_whatever_the_data(command: dict[str, str]):
    config = from_mapping({"data": {"dataset": "parquet"}, "model": command})
    named = from_mapping({"data": {"dataset": "voc"}})
    assert config.method == named.method
    assert (config.optim.optimizer, config.optim.lr) == ("adamw", named.optim.lr)
    assert given(config) == set(command)
    given_too = from_mapping(
        {"data": {"dataset": "parquet"}, "model": command, "method": {"alpha": 100.0}}
    )
    assert given_too.method.alpha == 100.0
    classifiers = from_mapping({"data": {"dataset": "parquet"}, "model": {"student": "resnet8"}})
    assert classifiers.method == Config().method


# YAML files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lr: 0.1", "broken.yaml: not valid YAML: .*line 1"),
        ("a: b: c", "broken.yaml: not valid YAML: .*line 1"),
        ("- lr", "broken.yaml: must contain keys and values, not list"),
        ("lr", "broken.yaml: must contain keys and values, not str"),
        ("x: !!python/object/apply:os.getcwd []", "broken.yaml: not valid YAML"),
        ("optim: {lr: 2001-99-99}", "broken.yaml: not valid YAML: month must be in 1..12"),
        ("optim: {lr: 0b_}", "broken.yaml: not valid YAML: invalid literal"),
        ("[" * 5000, "broken.yaml: not valid YAML: nested too deeply"),
    ],
)
def test_broken_yaml_names_the_file(text: str, message: str):
    with pytest.raises(ConfigError, match=f"^{message}") as raised:
        from_yaml(text, where="broken.yaml")
    assert "\n" not in str(raised.value)


# The registry


def test_what_sources_say_of_methods_is_what_importing_them_says():
    code = """
import dataclasses, sys
from raygkd.registry import METHODS
for name, settings in METHODS.settings().items():
    for leaf in dataclasses.fields(settings):
        print(name, leaf.name, leaf.default, dict(leaf.metadata))
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    imported = {name: own_settings(METHODS.get(name)) for name in METHODS.names()}
    assert done.stdout.splitlines() == [
        f"{name} {leaf.name} {leaf.default} {dict(leaf.metadata)}"
        for name, cls in imported.items()
        if cls is not None
        for leaf in dataclasses.fields(cls)
    ]


def test_registry_gives_what_was_entered():
    table: Registry[type] = Registry("thing", "raygkd.things", type)
    assert table.register("list")(list) is list
    table.register("dict")(dict)
    assert table.get("list") is list
    assert table.names() == ["list", "dict"]


def test_registry_refuses_a_name_that_is_taken():
    table: Registry[type] = Registry("thing", "raygkd.things", type)
    table.register("list")(list)
    with pytest.raises(ValueError, match="thing 'list' is already registered"):
        table.register("list")(dict)
    assert table.get("list") is list


def test_registry_lists_the_known_names():
    table: Registry[type] = Registry("thing", "raygkd.things", type)
    table.register("list")(list)
    table.register("dict")(dict)
    with pytest.raises(ConfigError) as raised:
        table.get("lisst")
    assert str(raised.value) == "unknown thing 'lisst'; did you mean 'list'? (known: list, dict)"
