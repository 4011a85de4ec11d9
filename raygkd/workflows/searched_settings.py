"""What a search that varies teacher, image size or augmentation shares between its trials.

Images are prepared once, at the largest size, and each teacher is trained once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from raygkd.assembly.models import is_model_file
from raygkd.config import Config, flag, given, text_of, value_of, with_settings
from raygkd.config.search_space import Dimension, read_space
from raygkd.data.unlabelled import lacks_labels
from raygkd.errors import ConfigError
from raygkd.models import NONE, PRETRAINED, short_name
from raygkd.storage.atomic_files import Place, place
from raygkd.workflows.input_sizes import with_teacher_size
from raygkd.workflows.resume import lasting_name, lasting_path

Space = tuple[Dimension, ...]
# searched settings that decide how images and teacher are prepared
PREPARED = ("teacher", "image_size", "augment")
# cuts the images in evaluation as well
_CUTS = "resized-crop"


def given_space(config: Config) -> Space | None:
    """Return the space that ``--space`` names; None for the default one."""
    return read_space(config.search.space) if config.search.space else None


def first_of_run(config: Config, space: Collection[Dimension]) -> dict[str, Any]:
    """Return the settings with which images and teacher of a search are prepared.

    They are the first teacher and augmentation of the space, and its largest image size.

    Args:
        config: of the search.
        space: that is given.

    Raises:
        ConfigError: another value is given as well, or trials could not share the images.
    """
    values = {one.name: one.values for one in space if one.name in PREPARED}
    for name, choices in values.items():
        _check_given(config, name, choices)
    if "image_size" in values and None in values["image_size"]:
        raise ConfigError("search space: image_size: must be numbers of pixels, not null")
    _check_augment(values.get("augment", ()))
    if len(values.get("teacher", ())) > 1:
        _check_teachers(config, values["teacher"])
    return {
        name: max(choices) if name == "image_size" else choices[0]
        for name, choices in values.items()
    }


def _check_given(config: Config, name: str, choices: Collection[Any]) -> None:
    value, output = value_of(config, name), place(config.output.output)
    if name not in given(config) or value in choices:
        return
    if name == "teacher" and value in {lasting_model(one, output) for one in choices}:
        return
    raise ConfigError(
        f"{flag(name)} {text_of(value)}: is not among the search space's "
        f"{', '.join(map(text_of, choices))}; omit it, or add it to the space"
    )


def _check_augment(choices: Collection[str]) -> None:
    if "auto" in choices:
        raise ConfigError("search space: augment: auto is one of the others; name it instead")
    if _CUTS in choices and len(choices) > 1:
        raise ConfigError(
            f"search space: augment: {_CUTS} cuts the validation images as well, so its scores "
            "cannot be compared with those of the others; run a search of its own (--augment "
            f"{_CUTS})"
        )


def _check_teachers(config: Config, teachers: Collection[str]) -> None:
    """Refuse settings that fit one teacher, and teachers whose trials cannot be compared."""
    model = config.model
    if model.teacher_weights not in (None, PRETRAINED, NONE):
        raise ConfigError(
            f"--teacher-weights {model.teacher_weights}: fits one teacher, not {len(teachers)}; "
            "omit it, or search the teachers separately"
        )
    if model.teacher_classes is not None:
        raise ConfigError(
            f"--teacher-classes {model.teacher_classes}: fits one teacher, not {len(teachers)}; "
            "search the teachers separately"
        )
    if lacks_labels(config.data.dataset):
        raise ConfigError(
            "search space: teacher: without labels a trial is scored by its likeness to its "
            "teacher, so those of several cannot be compared; search the teachers separately"
        )
    sizes = {
        name: with_teacher_size(with_settings(config, {"teacher": name})).data.teacher_image_size
        for name in teachers
    }
    if len(set(sizes.values())) > 1:
        told = ", ".join(
            f"{short_name(name)} {'that of the student' if size is None else f'{size} pixels'}"
            for name, size in sizes.items()
        )
        raise ConfigError(
            f"search space: teacher: the input sizes differ ({told}), and trials share the images; "
            "pass --teacher-image-size, or search the teachers separately"
        )


def lasting_model(name: str, output: Place) -> str:
    """Return a teacher's name or path that stays valid wherever the run is resumed."""
    return lasting_path(name, output) if is_model_file(name) else lasting_name(name, output)


def lasting_names(choices: Mapping[str, Collection[str]], output: Place) -> dict[str, str]:
    """Return old name -> lasting name of the students and teachers of a search.

    Args:
        choices: "student" and "teacher" -> names.
        output: the output folder.
    """
    return {
        **{name: lasting_name(name, output) for name in choices["student"]},
        **{name: lasting_model(name, output) for name in choices["teacher"]},
    }
