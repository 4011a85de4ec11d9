"""The students and methods that a search chooses from, and the space over all of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from torch import nn

from raygkd.assembly.compatibility import check_settings
from raygkd.assembly.matched_levels import level_shapes, matched_levels
from raygkd.assembly.methods import matches_graphs, reads_logits, reads_setting
from raygkd.assembly.models import new_model, start_from_weights
from raygkd.config import Config, given, value_of, with_settings
from raygkd.config.search_space import (
    DECISIVE,
    Dimension,
    check_space,
    default_settings,
    default_space,
    extremes,
    in_space,
)
from raygkd.data.spec import ImageSpec
from raygkd.data.unlabelled import lacks_labels
from raygkd.errors import ConfigError
from raygkd.losses import trains_classifier
from raygkd.models import short_name
from raygkd.workflows.budgets import Built, built_name
from raygkd.workflows.first_trials import FEWEST_FOR_KD, Params, first_trials, kd_settings, wants_kd
from raygkd.workflows.pair_checks import naming_option, show_pair
from raygkd.workflows.searched_settings import Space, first_of_run

# name of a decisive setting -> its values
Choices = Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A student with a method, a teacher and an input size.

    Attributes:
        config: the settings of the run, with these.
        decisive: those of them that are searched.
        spec: of the images, with the input size.
        channels: level -> the teacher's channels, of the levels that both models have; empty for a
            method that matches no graphs.
    """

    config: Config
    decisive: Params
    spec: ImageSpec
    channels: Mapping[int, int]


def with_first_candidate(config: Config, space: Space | None = None) -> Config:
    """Return the settings of the run, where some are searched.

    They are the first of ``--students`` and ``--methods``, and of the teachers and augmentations of
    the space, and its largest image size, to which images are resized for all trials.

    Args:
        config: of the search.
        space: that is given; None for the default one.

    Raises:
        ConfigError: another one is given as well, or values that cannot be compared.
    """
    first = first_of_run(config, space or ())
    if config.search.students:
        _check_listed_students(config, config.search.students)
        first["student"] = config.search.students[0]
    if config.compare.methods:
        _check_listed_methods(config, config.compare.methods)
        first["method"] = config.compare.methods[0]
    return with_settings(config, first) if first else config


def _check_listed_students(config: Config, students: Sequence[str]) -> None:
    if "student" in given(config) and config.model.student not in students:
        raise ConfigError(
            f"--student {config.model.student}: is not among --students {','.join(students)}; omit "
            "one of the two options"
        )
    if len(students) > 1 and config.model.student_weights not in (None, "pretrained", "none"):
        raise ConfigError(
            f"--student-weights {config.model.student_weights}: fits one student, not "
            f"{len(students)}; omit it, or pass pretrained or none"
        )


def _check_listed_methods(config: Config, methods: Sequence[str]) -> None:
    method, shown = config.method.method, ",".join(methods)
    if "method" in given(config) and method not in methods:
        raise ConfigError(
            f"--method {method}: is not among --methods {shown}; omit one of the two options"
        )
    if len(methods) > 1 and "none" in methods:
        raise ConfigError(
            "--methods: none is the student alone, which every search trains for comparison; "
            "omit it"
        )
    if lacks_labels(config.data.dataset) and len(set(map(trains_classifier, methods))) > 1:
        raise ConfigError(
            f"--methods {shown}: without labels some of them teach feature maps and others "
            "classes, so their scores cannot be compared; search them separately"
        )


def searched_choices(config: Config, space: Space | None) -> dict[str, tuple[Any, ...]]:
    """Return what a search chooses from: name of a decisive setting -> its values.

    Args:
        config: of the search.
        space: that is given; None for the default one.

    Raises:
        ConfigError: students or methods in both.
    """
    listed = {"student": config.search.students, "method": config.compare.methods}
    options = {"student": "--students", "method": "--methods"}
    found = {}
    for name in DECISIVE:
        of_space = next((one.values for one in space or () if one.name == name), None)
        own = listed.get(name)
        if of_space is not None and own is not None:
            raise ConfigError(f"{options[name]}: --space has a {name}, too; omit one of them")
        # images have their own size, or a given one, unless several are searched
        alone = None if name == "image_size" else value_of(config, name)
        found[name] = tuple(of_space or own or (alone,))
    return found


def candidates(
    config: Config,
    choices: Choices,
    built: Sequence[Built],
    space: Space | None,
    teachers: Mapping[str, nn.Module],
    spec: ImageSpec,
) -> list[Candidate]:
    """Return every student with every method and teacher, checked with it.

    Args:
        config: of the search.
        choices: see ``searched_choices``.
        built: the students with their input sizes.
        space: that is given; None for the default one.
        teachers: name -> model.
        spec: of the images.

    Raises:
        UserError: a pair that cannot be trained, or weights that cannot be had.
    """
    named = {one.name for one in space or ()}
    searched = {name for name, values in choices.items() if len(values) > 1 or name in named}
    found: list[Candidate] = []
    for student, side in built:
        own_spec = spec.of_trial({"image_size": side})
        own = with_settings(config, {"student": student})
        if student != config.model.student:
            with naming_option("--student-weights"):
                start_from_weights(own, new_model(student, own_spec), len(spec.class_names))
        for method, teacher in itertools.product(choices["method"], choices["teacher"]):
            chosen: Params = {"student": student, "method": method, "teacher": teacher}
            chosen |= {} if side is None else {"image_size": side}
            one = with_settings(config, chosen)
            check_settings(one, spec.task)
            channels = {}
            if matches_graphs(method):
                shapes = level_shapes(one, teachers[teacher], own_spec)
                channels = {level: shape[0] for level, shape in shapes.items()}
            decisive: Params = {name: chosen[name] for name in DECISIVE if name in searched}
            found.append(Candidate(config=one, decisive=decisive, spec=own_spec, channels=channels))
    _check_cache(found, teachers)
    return found


def _check_cache(found: Sequence[Candidate], teachers: Mapping[str, nn.Module]) -> None:
    """Refuse to cache the teacher's maps for students that learn from different levels of it.

    Raises:
        ConfigError: there is a cache, and such students.
    """
    if not found[0].config.cluster.teacher_cache_mb:
        return
    # of each teacher: the matched levels -> the first that matches them
    pairs: dict[str, dict[tuple[tuple[int, int], ...], Candidate]] = {}
    for one in found:
        method, model = one.config.method.method, one.config.model
        if matches_graphs(method) or not reads_logits(method):
            student = new_model(model.student, one.spec)
            matched = matched_levels(one.config, teachers[model.teacher], student, one.spec)
            of_teacher = pairs.setdefault(model.teacher, {})
            of_teacher.setdefault(tuple(sorted(matched.pairs.items())), one)
    for several in pairs.values():
        if len(several) > 1:
            first, second = (
                built_name(one.config.model.student, one.decisive.get("image_size"))
                for one in list(several.values())[:2]
            )
            raise ConfigError(
                f"--teacher-cache-mb: {first} and {second} learn from different levels of the "
                "teacher, but only one set can be cached; omit it, or search them separately"
            )


def joint_space(found: Sequence[Candidate], space: Space | None, spec: ImageSpec) -> Space:
    """Return the search space over all candidates, checked.

    A setting is drawn where the candidate's method reads it; what all have is drawn for all.

    Args:
        found: the candidates.
        space: that is given; None for the default space of each.
        spec: of the images.

    Raises:
        ConfigError: a setting that no method reads, or values that a candidate cannot have.
    """
    dimensions: dict[str, Dimension] = {}
    cases: dict[str, list[Params]] = {}
    for candidate in found:
        own = _own_space(candidate, space, spec)
        check_space(own, candidate.config, candidate.channels)
        for dimension in own:
            key = repr(dimension)
            dimensions[key] = dimension
            cases.setdefault(key, []).append(candidate.decisive)
    for dimension in space or ():
        if dimension.name not in DECISIVE and repr(dimension) not in dimensions:
            methods = dict.fromkeys(one.config.method.method for one in found)
            raise ConfigError(
                f"search space: {dimension.name} is a setting of no method that is searched "
                f"({', '.join(methods)}); remove it, or add its method"
            )
    every = [one.decisive for one in found]
    return (
        *_decisive_dimensions(every),
        *(
            replace(dimension, when=_when(cases[key], every))
            for key, dimension in dimensions.items()
        ),
    )


def _decisive_dimensions(every: Sequence[Params]) -> list[Dimension]:
    """Return the dimensions of the decisive settings, of which a later one may depend on others.

    Args:
        every: the decisive settings of each candidate.
    """
    found = []
    earlier: list[str] = []
    for name in every[0]:
        # what is drawn before -> what may follow it
        values: dict[tuple[Any, ...], dict[Any, None]] = {}
        for one in every:
            values.setdefault(tuple(one[key] for key in earlier), {})[one[name]] = None
        for choices in dict.fromkeys(map(tuple, values.values())):
            cases = [
                one for one in every if tuple(values[tuple(one[key] for key in earlier)]) == choices
            ]
            before = [{key: one[key] for key in earlier} for one in cases]
            all_before = [{key: one[key] for key in earlier} for one in every]
            found.append(Dimension(name, "choice", choices, _when(before, all_before)))
        earlier.append(name)
    return found


def _when(
    cases: Sequence[Params], every: Sequence[Params]
) -> tuple[tuple[tuple[str, Any], ...], ...]:
    """Return the cases in which a setting is drawn, without the names that do not matter.

    Args:
        cases: decisive settings with it.
        every: those of all candidates.
    """
    names = list(every[0])
    wanted = {tuple(one.items()) for one in cases}
    for name in tuple(names):
        others = [key for key in names if key != name]
        kept = {tuple((key, one[key]) for key in others) for one in cases}
        if all(
            (tuple(one.items()) in wanted) == (tuple((key, one[key]) for key in others) in kept)
            for one in every
        ):
            names = others
    found = dict.fromkeys(tuple((key, one[key]) for key in names) for one in cases)
    return tuple(found) if names else ()


def _own_space(candidate: Candidate, space: Space | None, spec: ImageSpec) -> Space:
    """Return what is drawn for one candidate, without the decisive settings."""
    config = candidate.config
    method, levels = config.method.method, config.method.levels
    if space is not None:
        others = [one for one in space if one.name not in DECISIVE]
        if not candidate.decisive.get("method"):
            return tuple(others)
        return tuple(one for one in others if reads_setting(method, one.name))
    chosen = levels and {pair.student for pair in levels}
    return default_space(
        method,
        {
            level: width
            for level, width in candidate.channels.items()
            if chosen is None or level in chosen
        },
        lr=config.optim.lr,
        detection=spec.task == "detection",
        weights_unit=config.method.weights_unit,
        # given settings are not searched, except for the learning rate: the best is near a good one
        fixed=given(config) - {"lr"},
    )


def largest_batch(space: Space) -> int | None:
    """Return the largest batch that is drawn; None if it is not searched."""
    sizes = [max(extremes(one)) for one in space if one.name == "batch_size"]
    return max(sizes, default=None)


def first_of_all(
    config: Config, found: Sequence[Candidate], space: Space, task: str
) -> list[Params]:
    """Return the settings of the first trials; see ``first_trials``.

    Of several candidates each student with each method has a trial with the default settings, and
    with enough trials each student one of kd. Teachers and input sizes take turns.

    Args:
        config: of the search.
        found: the candidates.
        space: over all of them.
        task: of the images.
    """
    trials = config.search.trials
    if len(found) == 1 or config.search.warm_start is not None:
        return first_trials(config, space, found[0].channels, task)
    defaults = []
    firsts = _of_pairs(found)
    for one in firsts:
        own = [each for each in space if each.name not in DECISIVE and each.applies(one.decisive)]
        defaults.append(one.decisive | default_settings(own, one.config, one.channels))
    first = [
        params for params in defaults if config.search.space is None or in_space(params, space)
    ]
    students = dict.fromkeys(one.config.model.student for one in found)
    if wants_kd(found[0].config, task) and trials >= FEWEST_FOR_KD * len(students):
        first += [_kd_of(one, default) for one, default in _of_students(firsts, defaults)]
    return first[:trials]


def _of_pairs(found: Sequence[Candidate]) -> list[Candidate]:
    """Return one candidate of each student with each method, with its teacher and size in turn."""
    of_pair: dict[tuple[str, str], list[Candidate]] = {}
    for one in found:
        pair = (one.config.model.student, one.config.method.method)
        of_pair.setdefault(pair, []).append(one)
    return [several[turn % len(several)] for turn, several in enumerate(of_pair.values())]


def _of_students(
    found: Sequence[Candidate], defaults: Sequence[Params]
) -> list[tuple[Candidate, Params]]:
    """Return the first candidate of each student, with its default settings."""
    of_student: dict[str, tuple[Candidate, Params]] = {}
    for one, default in zip(found, defaults, strict=True):
        of_student.setdefault(one.config.model.student, (one, default))
    return list(of_student.values())


def _kd_of(one: Candidate, default: Params) -> Params:
    """Return the settings of kd for the student of a candidate."""
    kept = {name: value for name, value in one.decisive.items() if name != "method"}
    return kept | kd_settings(one.config, default)


def show_candidates(
    found: Sequence[Candidate], teachers: Mapping[str, nn.Module], console: Console
) -> None:
    """Print how each candidate is matched with its teacher."""
    for one in found:
        model = one.config.model
        if len(found) > 1:
            title = built_name(model.student, one.decisive.get("image_size"))
            title += f" by {one.config.method.method}"
            if "teacher" in one.decisive:
                title += f" from {short_name(model.teacher)}"
            console.print(title, soft_wrap=True)
        # all levels, with the largest dimension; trials use subsets of these
        most = {"dim": min(one.channels.values()) - 1} if one.channels else {}
        show_pair(with_settings(one.config, most), one.spec, teachers[model.teacher], console)
