"""The search space: its file, its defaults, and what is refused before a trial starts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from raygkd.config import Config, from_mapping, settings, value_of, with_settings
from raygkd.config.search_space import (
    Dimension,
    check_space,
    default_settings,
    default_space,
    in_space,
    read_space,
    searchable,
)
from raygkd.config.values import plain
from raygkd.errors import ConfigError
from raygkd.registry import METHODS

CHANNELS = {1: 16, 2: 32, 3: 64}


def space_file(folder: Path, text: str) -> str:
    path = folder / "space.yaml"
    path.write_text(text)
    return str(path)


def refusal(folder: Path, text: str) -> list[str]:
    """Return the lines of the error that a space file gives, without the file's name."""
    path = space_file(folder, text)
    with pytest.raises(ConfigError) as raised:
        read_space(path)
    lines = str(raised.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


def check(*space: Dimension, channels: dict[int, int] | None = None, **values: Any) -> list[str]:
    """Return what is refused in a space; nothing where it is allowed."""
    try:
        check_space(
            space, with_settings(Config(), values), CHANNELS if channels is None else channels
        )
    except ConfigError as error:
        return str(error).splitlines()
    return []


# Which settings


def test_models_and_images_are_searchable_and_what_asha_spends_is_not():
    names = searchable()
    assert {"student", "method", "optimizer", "lr", "levels", "alpha", "kd_weight"} <= set(names)
    assert not {"epochs", "seed", "amp", "compile"} & set(names)
    of_run = {name for name in names if settings()[name][0] in ("data", "model")}
    assert of_run == {"student", "teacher", "image_size", "augment"}
    assert {settings()[name][0] for name in set(names) - of_run} == {"method", "optim", "recipe"}


# The file


def test_file_gives_its_dimensions_in_order(tmp_path: Path):
    path = space_file(
        tmp_path,
        """
        lr: {loguniform: [1e-3, 0.1]}
        levels: {choice: [[1], [2, 3], null]}
        dim: {randint: [2, 9]}
        kd_weight: {uniform: [0.5, 1]}
        clip_norm: {choice: [null, 1]}
        schedule: {choice: [cosine, constant]}
        """,
    )
    assert read_space(path) == (
        Dimension("lr", "loguniform", (0.001, 0.1)),
        Dimension("levels", "choice", ([1], [2, 3], None)),
        Dimension("dim", "randint", (2, 9)),
        Dimension("kd_weight", "uniform", (0.5, 1.0)),
        Dimension("clip_norm", "choice", (None, 1.0)),
        Dimension("schedule", "choice", ("cosine", "constant")),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gama: {uniform: [0, 1]}", "'gama' cannot be searched; did you mean 'gamma'"),
        ("epochs: {choice: [1]}", "'epochs' cannot be searched"),
        ("1: {choice: [1]}", "1 cannot be searched"),
        ("lr: 0.1", "lr: must be one of {choice: a list of values; uniform: [low, high]; log"),
        ("lr: {normal: [0, 1]}", "lr: must be one of {choice"),
        ("lr: {uniform: [0, 1], choice: [1]}", "lr: must be one of {choice"),
        ("lr: {choice: 1}", "lr: choice takes a list of values, not 1"),
        ("lr: {choice: []}", "lr: choice takes a list of values, not []"),
        ("lr: {choice: [fast]}", "--lr 'fast': must be a number"),
        ("lr: {uniform: [1]}", "lr: uniform takes [low, high] with low below high, not [1]"),
        ("lr: {uniform: [1, 0]}", "lr: uniform takes [low, high] with low below high, not [1, 0]"),
        ("lr: {uniform: [1, 1]}", "lr: uniform takes [low, high] with low below high, not [1, 1]"),
        ("lr: {uniform: [0, .nan]}", "lr: uniform takes [low, high] with low below high"),
        ("lr: {uniform: [a, b]}", "--lr 'a': must be a number"),
        ("lr: {uniform: [false, true]}", "--lr False: must be a number"),
        ("clip_norm: {uniform: [null, 1]}", "clip_norm: uniform takes [low, high] with low below"),
        ("alpha: {loguniform: [0, 1]}", "alpha: loguniform takes [low, high], both above 0, not"),
        (
            "dim: {loguniform: [2, 16]}",
            "dim: must be one of {choice: a list of values; randint: [low, high], high excluded}",
        ),
        ("dim: {uniform: [2, 16]}", "dim: must be one of {choice"),
        ("dim: {randint: [2, 8.5]}", "--dim 8.5: must be a whole number"),
        ("alpha: {randint: [0, 3]}", "alpha: must be one of {choice"),
        ("schedule: {uniform: [0, 1]}", "schedule: must be one of {choice: a list of values}, not"),
        ("levels: {choice: [1, 2]}", "--levels 1: must be a list of levels"),
        ("", "has no settings (allowed: "),
        ("lr: {uniform: [0", "not valid YAML: "),
        ("- lr", "must contain keys and values, not list"),
    ],
)
def test_wrong_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str):
    (line,) = refusal(tmp_path, text)
    assert line.startswith(message)


def test_all_problems_of_a_file_come_at_once(tmp_path: Path):
    lines = refusal(tmp_path, "gama: {uniform: [0, 1]}\nlr: 3\nbeta: {uniform: [0, 1]}\n")
    assert [line.partition(" ")[0] for line in lines] == ["'gama'", "lr:"]


def test_file_that_cannot_be_read_is_named(tmp_path: Path):
    missing = str(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=f"--space {missing}: cannot be read: No such file"):
        read_space(missing)
    binary = tmp_path / "sheet.png"
    binary.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with pytest.raises(ConfigError, match=f"{binary}: not valid YAML"):
        read_space(str(binary))


# The defaults


@pytest.mark.parametrize("method", METHODS.names())
@pytest.mark.parametrize(
    "channels",
    [
        CHANNELS,
        {1: 2},
        {2: 3, 4: 5},
        {1: 64, 2: 128, 3: 256, 4: 512, 5: 512},
        {1: 256, 2: 512, 3: 1024, 4: 2048},
        {level: 8 * level for level in range(1, 9)},
    ],
    ids=str,
)
def test_default_space_is_allowed(method: str, channels: dict[int, int]):
    space = default_space(method, channels)
    config = with_settings(Config(), {"method": method})
    check_space(space, config, channels if METHODS.get(method).matches_graphs else {})
    assert "lr" in {dimension.name for dimension in space}
    assert all(dimension.name in searchable() for dimension in space)


def test_default_space_of_the_graph_varies_all_of_its_settings():
    space = {dimension.name: dimension for dimension in default_space("graph", CHANNELS)}
    assert space.keys() == {"lr", "levels", "temperature", "dim", "alpha", "beta", "gamma"}
    subsets = [s for n in (2, 3) for s in itertools.combinations((1, 2, 3), n)]
    assert [tuple(levels) for levels in space["levels"].values] == subsets
    assert space["dim"].values == (2, 4, 8)


def test_default_space_of_detectors_has_the_same_ranges_around_its_own_rate():
    channels = dict.fromkeys(range(3, 8), 64)
    space, other = (
        {d.name: d for d in default_space("graph", channels, lr=1e-3, detection=detection)}
        for detection in (True, False)
    )
    assert list(space) == list(other)
    assert space["lr"].values == (4e-4, 4e-3)
    shared = ("temperature", "dim", "alpha", "beta", "gamma")
    assert all(space[name] == other[name] for name in shared)
    # the finest levels, whose maps have the most positions
    assert all(levels[0] == 3 for levels in space["levels"].values)


@pytest.mark.parametrize("detection", [False, True])
def test_default_space_is_around_the_defaults(detection: bool):
    tree = {"data": {"dataset": "digits-voc" if detection else "cifar10"}}
    config = from_mapping(tree)
    channels = dict.fromkeys(range(3, 6), 64)
    space = default_space("graph", channels, lr=config.optim.lr, detection=detection)
    for name in ("temperature", "alpha", "beta", "gamma"):
        [values] = [dimension.values for dimension in space if dimension.name == name]
        default = getattr(config.method, name)
        assert default in values or values[0] < default < values[1]


def test_default_space_keeps_to_the_unit_of_the_weights():
    found = {
        unit: {d.name: d.values for d in default_space("graph", CHANNELS, weights_unit=unit)}
        for unit in ("gradient", "loss")
    }
    assert found["gradient"]["alpha"] == (1.0, 10.0)
    assert found["loss"]["alpha"] == (3.0, 300.0)
    baselines = [
        {d.name: d.values for d in default_space("at", CHANNELS, weights_unit=unit)}
        for unit in ("gradient", "loss")
    ]
    assert [one["baseline_weight"] for one in baselines] == [(0.3, 10.0), (100.0, 10000.0)]


def test_settings_that_are_fixed_are_not_searched():
    space = default_space("graph", CHANNELS, fixed={"levels", "alpha", "seed"})
    assert {dimension.name for dimension in space} == {"lr", "temperature", "dim", "beta", "gamma"}


def test_default_space_varies_what_each_method_uses():
    names = {
        method: {dimension.name for dimension in default_space(method, CHANNELS)}
        for method in METHODS.names()
    }
    assert names["none"] == {"lr", "weight_decay"}
    assert names["kd"] == {"lr", "kd_temperature", "kd_weight"}
    assert names["graph+kd"] == names["graph"] | names["kd"]
    assert names["graph+dist"] == names["graph"] | names["dist"]
    assert names["graph+metrics"] == names["graph"] | names["graph-metrics"]
    assert names["trg"] == {"lr", "baseline_weight", "trg.temperature", "trg.context"}


def test_many_stages_give_the_deepest_ones_rather_than_all_subsets():
    channels = dict.fromkeys(range(1, 7), 64)
    space = {dimension.name: dimension for dimension in default_space("graph", channels)}
    assert len(space["levels"].values) == 5
    assert all(levels[-1] == 6 for levels in space["levels"].values)


# The default settings


@pytest.mark.parametrize("method", METHODS.names())
def test_default_settings_are_those_of_a_run_without_a_search(method: str):
    config = with_settings(Config(), {"method": method})
    channels = CHANNELS if METHODS.get(method).matches_graphs else {}
    space = default_space(method, channels)
    values = default_settings(space, config, channels)
    assert list(values) == [dimension.name for dimension in space]
    # a method's own settings are kept as given, though they are the defaults
    own = {name: value for name, value in values.items() if "." in name}
    assert own == {name: plain(value_of(config, name)) for name in own}
    levels = {"levels": [1, 2, 3]} if channels else {}
    expected = with_settings(config, levels | own)
    assert with_settings(config, values) == expected


def test_default_settings_of_the_graph_are_in_its_space():
    space = default_space("graph", CHANNELS)
    assert in_space(default_settings(space, Config(), CHANNELS), space)
    narrow = {1: 4, 2: 8}
    space = default_space("graph", narrow)
    values = default_settings(space, Config(), narrow)
    assert (values["dim"], values["levels"]) == (2, [1, 2])
    assert in_space(values, space)


def test_settings_are_in_a_space_that_has_the_same_names_and_their_values():
    space = (Dimension("lr", "loguniform", (0.1, 1.0)), Dimension("dim", "randint", (2, 5)))
    assert in_space({"lr": 0.1, "dim": 4}, space)
    assert not in_space({"lr": 0.1, "dim": 5}, space)
    assert not in_space({"lr": None, "dim": 4}, space)
    assert not in_space({"lr": 0.1}, space)
    assert not in_space({"lr": 0.1, "dim": 4, "method": "kd"}, space)
    levels = (Dimension("levels", "choice", ([1], [1, 2])),)
    assert in_space({"levels": [1, 2]}, levels)
    assert not in_space({"levels": None}, levels)


# What no trial can run with


def test_dimension_above_the_channels_names_level_and_range():
    message = "--dim 16: the teacher's map at level 1 has 16 channels (allowed: 1 to 15)"
    assert check(Dimension("dim", "choice", (4, 16))) == [message]
    assert check(Dimension("dim", "randint", (2, 17))) == [message]
    assert check(Dimension("dim", "choice", (4, 15))) == []
    assert check(Dimension("dim", "randint", (2, 16))) == []


def test_dimension_is_held_against_the_levels_that_are_searched():
    dim = Dimension("dim", "choice", (16, 31))
    assert check(dim, Dimension("levels", "choice", ([2], [2, 3]))) == []
    assert "level 1" in check(dim, Dimension("levels", "choice", ([2], [1, 3])))[0]
    assert "level 1" in check(dim, Dimension("levels", "choice", ([2], None)))[0]
    assert check(dim, levels=[2, 3]) == []


def test_dimension_that_is_not_searched_is_held_against_the_levels():
    levels = Dimension("levels", "choice", ([1], [3]))
    assert "--dim 20: the teacher's map at level 1" in check(levels, dim=20)[0]


def test_unknown_level_is_refused_with_the_known_ones():
    levels = Dimension("levels", "choice", ([1], [2, 4]))
    assert check(levels) == ["search space: level 4 does not exist (allowed: 1, 2, 3)"]
    assert check(Dimension("lr", "uniform", (0.1, 0.2)), levels=[5]) == [
        "--levels: level 5 does not exist (allowed: 1, 2, 3)"
    ]


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        (Dimension("temperature", "uniform", (-1.0, 1.0)), "--temperature -1.0: must be above 0"),
        (Dimension("kd_weight", "uniform", (0.5, 1.5)), "--kd-weight 1.5: must be above 0 and at"),
        (Dimension("dim", "randint", (0, 4)), "--dim 0: must be at least 1"),
        (Dimension("schedule", "choice", ("cosin",)), "--schedule 'cosin': must be one of cosine"),
        (Dimension("levels", "choice", ([1], [0])), "--levels '0': must be different whole"),
        (Dimension("batch_size", "choice", (64, 63)), "--batch-size 63 cannot be split evenly"),
        (Dimension("warmup_epochs", "uniform", (0.0, 10.0)), "--warmup-epochs 10.0: must be below"),
    ],
)
def test_value_no_trial_can_take_is_refused(dimension: Dimension, message: str):
    (line,) = check(dimension, workers=2)
    assert line.startswith(f"search space: {message}")


def test_wrong_types_are_told_beside_the_other_problems():
    lines = check(
        Dimension("levels", "choice", (3,)),
        Dimension("dim", "choice", ("many", 99)),
        Dimension("gamma", "uniform", (-1.0, 1.0)),
    )
    assert len(lines) == 3
    assert all(name in line for name, line in zip(("levels", "dim", "gamma"), lines, strict=True))


def test_weights_that_can_all_be_zero_are_refused():
    zero = [Dimension(name, "choice", (0.0, 1.0)) for name in ("alpha", "beta", "gamma")]
    (line,) = check(*zero)
    assert "--alpha, --beta and --gamma all 0" in line
    assert check(*zero[:2], gamma=1.0) == []
    assert check(*zero[:2], Dimension("gamma", "uniform", (0.0, 1.0))) == []
    assert check(*zero, method="kd", channels={}) == []
