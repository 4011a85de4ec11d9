"""What a search will do, checked against images and models before anything is trained."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from raygkd.assembly.unlabelled_runs import check_share, without_labels
from raygkd.config import Config, to_yaml, with_settings
from raygkd.data.run_images import Images
from raygkd.errors import ConfigError
from raygkd.models import LoadedWeights, short_name
from raygkd.storage.atomic_files import Place, place
from raygkd.workflows.budgets import Costs, built_name, measured_costs, within_budget
from raygkd.workflows.candidates import (
    Choices,
    Space,
    candidates,
    first_of_all,
    joint_space,
    largest_batch,
    searched_choices,
    show_candidates,
    with_first_candidate,
)
from raygkd.workflows.first_trials import Params
from raygkd.workflows.pair_checks import (
    check_names,
    check_student,
    check_students,
    teacher_model,
    teacher_weights,
)
from raygkd.workflows.preflight import keep_model
from raygkd.workflows.results import pair_name
from raygkd.workflows.run_tags import run_tags
from raygkd.workflows.searched_settings import given_space, lasting_names
from raygkd.workflows.session import Session, open_session
from raygkd.workflows.teachers import teacher_facts


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a search will do.

    Attributes:
        space: that settings are drawn from.
        first: settings of the first trials.
        costs: costs of each student, if the search depends on them.
        teachers: name -> weights that it starts from, where they are not random; the first is the
            teacher of the run.
    """

    space: Space
    first: list[Params]
    costs: Costs
    teachers: Mapping[str, LoadedWeights | None]

    def named(self, names: Mapping[str, str]) -> Plan:
        """Return the plan with other names of models, old name -> new name."""

        def renamed(value: Any) -> Any:
            return names.get(value, value) if isinstance(value, str) else value

        return Plan(
            space=tuple(
                replace(
                    one,
                    values=tuple(map(renamed, one.values)),
                    when=tuple(tuple((key, renamed(of)) for key, of in case) for case in one.when),
                )
                for one in self.space
            ),
            first=[{key: renamed(value) for key, value in one.items()} for one in self.first],
            costs={(renamed(name), side): of for (name, side), of in self.costs.items()},
            teachers={renamed(name): weights for name, weights in self.teachers.items()},
        )

    def facts(self) -> dict[str, Any]:
        """Return what must not change until a resume."""
        dimensions: dict[str, Any] = {}
        for one in self.space:
            case = " or ".join(" ".join(str(value) for _, value in case) for case in one.when)
            name = f"{one.name} of {case}" if case else one.name
            when = {"when": [dict(case) for case in one.when]} if one.when else {}
            dimensions[f"search space, {name}"] = {one.kind: list(one.values), **when}
        weights = {
            f"teacher {short_name(name)}, starting weights": known.sha256
            for name, known in list(self.teachers.items())[1:]
            if known is not None
        }
        return {**dimensions, "first trials": self.first, **weights}


@contextlib.contextmanager
def open_search(
    config: Config, *, console: Console, resume: Place | None = None
) -> Iterator[tuple[Session, Plan]]:
    """Open the run of a search; yield it and its plan, which is checked."""
    space = given_space(config)
    config = without_labels(with_first_candidate(config, space))
    choices = searched_choices(config, space)
    check_students(config.search.students or ())
    for teacher in choices["teacher"]:
        check_names(with_settings(config, {"teacher": teacher}))
    plan: Plan | None = None
    names: dict[str, str] = {}

    def check(images: Images) -> dict[str, Any]:
        nonlocal plan, names
        plan = search_plan(config, images, console)
        names = lasting_names(choices, place(config.output.output))
        plan = plan.named(names)
        return {**_teacher_facts(config, choices), **plan.facts()}

    with open_session(config, "search", console, resume, check) as session:
        assert plan is not None
        for name in names:
            keep_model(name, session.output)
        session.tracker.start(
            "search",
            f"search {pair_name(config)}",
            tags=run_tags(session, "search"),
            texts={"config.yaml": to_yaml(session.config)},
        )
        yield session, plan


def _teacher_facts(config: Config, choices: Choices) -> dict[str, Any]:
    """Return the facts that identify the teachers."""
    facts: dict[str, Any] = {}
    for number, name in enumerate(choices["teacher"]):
        own = teacher_facts(with_settings(config, {"teacher": name}))
        facts |= {f"{fact}{f' ({number + 1})' if number else ''}": own[fact] for fact in own}
    return facts


def search_plan(config: Config, images: Images, console: Console) -> Plan:
    """Return the plan of a search, checked against the models; print the levels.

    Raises:
        ConfigError: an invalid space file, settings that no trial could run with, or no student
            within the budget.
    """
    space = given_space(config)
    choices, spec = searched_choices(config, space), images.spec
    if choices["image_size"] != (None,) and spec.task == "detection":
        raise ConfigError(
            "search space: image_size: boxes are in pixels of one image size, which teacher and "
            "students share; run one search for each --image-size"
        )
    students = tuple(itertools.product(choices["student"], choices["image_size"]))
    for student, side in students:
        option = None if len(students) == 1 else f"--students {built_name(student, side)}"
        sized = replace(images, spec=spec.of_trial({"image_size": side}))
        check_student(with_settings(config, {"student": student}), sized, option=option)
    costs = measured_costs(config, students, spec)
    students = within_budget(config, students, costs, console)
    of_teacher = {name: with_settings(config, {"teacher": name}) for name in choices["teacher"]}
    teachers = {name: teacher_model(one, spec) for name, one in of_teacher.items()}
    for method in choices["method"]:
        check_share(with_settings(config, {"method": method}), spec)
    found = candidates(config, choices, students, space, teachers, spec)
    drawn = joint_space(found, space, spec)
    if (largest := largest_batch(drawn)) is not None:
        check_student(with_settings(config, {"batch_size": largest}), images)
    first = first_of_all(config, found, drawn, spec.task)
    show_candidates(found, teachers, console)
    return Plan(
        space=drawn,
        first=first,
        costs=costs,
        teachers=_weights(config, of_teacher, images, console),
    )


def _weights(
    config: Config, of_teacher: Mapping[str, Config], images: Images, console: Console
) -> dict[str, LoadedWeights | None]:
    """Return what the teachers start from; None for that of the run, whose session loads it."""
    found: dict[str, LoadedWeights | None] = {}
    for name, own in of_teacher.items():
        found[name] = None
        if name != config.model.teacher:
            console.print(f"teacher {short_name(name)}:", soft_wrap=True)
            found[name] = teacher_weights(own, images.spec, console)
    return found
