"""Image-text models as teachers: the texts that name the classes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from raygkd.config import Config, with_settings
from raygkd.data.spec import ImageSpec
from raygkd.errors import ConfigError, DataError
from raygkd.models import NONE, family_name, family_of, read_class_names, short_name
from raygkd.models.starting_weights import chosen_weights
from raygkd.models.text_classifier import (
    DEFAULT_PROMPT,
    ImageTextFamily,
    TextClassifier,
    describe_classes,
    read_prompts,
)

# modes in which an image-text model is not trained
_MODES = ("auto", "as-is", "features")


@dataclass(frozen=True)
class Texts:
    """What the classes of the images are called in texts.

    Attributes:
        class_names: in the order of the images' classes.
        prompts: templates with ``{}`` for a class name.
    """

    class_names: tuple[str, ...]
    prompts: tuple[str, ...]


def with_text_teacher(config: Config) -> Config:
    """Return a configuration whose teacher is named as a classifier by texts, if it can be one.

    ``hf:`` of an image-text model becomes ``hf-clip:`` if it is not to be trained.

    Raises:
        UserError: the configuration of the model cannot be had.
    """
    model = config.model
    family = family_of(model.teacher)
    name = None if family is None else family.by_texts(family_name(model.teacher))
    if name is None or model.teacher_mode not in _MODES or model.teacher_weights is not None:
        return config
    return with_settings(config, {"teacher": name})


def reads_texts(config: Config) -> bool:
    """Return whether the teacher of a run classifies by texts."""
    return isinstance(family_of(with_text_teacher(config).model.teacher), ImageTextFamily)


def check_texts(config: Config) -> None:
    """Refuse class names and prompts that cannot be read, or of a teacher without texts.

    Raises:
        ConfigError: says why.
        DataError: a file cannot be read.
    """
    model = config.model
    for flag, path, read in (
        ("--class-names", model.class_names, read_class_names),
        ("--prompts", model.prompts, read_prompts),
    ):
        if path is None:
            continue
        if not reads_texts(config):
            raise ConfigError(
                f"{flag} {path}: {short_name(model.teacher)} is not an image-text model, or is to "
                f"be trained (--teacher-mode {model.teacher_mode}); omit {flag}"
            )
        try:
            read(path)
        except DataError as error:
            raise DataError(f"{flag}: {error}") from error


def texts_of(config: Config, spec: ImageSpec) -> Texts:
    """Return the class names and prompts of a run: given ones, or the images' own class names.

    Raises:
        DataError: a file cannot be read.
    """
    model = config.model
    return Texts(
        spec.class_names if model.class_names is None else read_class_names(model.class_names),
        (DEFAULT_PROMPT,) if model.prompts is None else read_prompts(model.prompts),
    )


def add_texts(config: Config, spec: ImageSpec, teacher: nn.Module) -> Texts | None:
    """Give a teacher that classifies by texts those of the images' classes, and return them.

    None for any other teacher, and for one of which only the feature maps are used.

    Raises:
        ConfigError: it is to be trained, or there is not one name for each class.
        UserError: its text encoder cannot be had.
    """
    if not isinstance(teacher, TextClassifier):
        return None
    model = config.model
    family = family_of(model.teacher)
    assert isinstance(family, ImageTextFamily)
    chosen = chosen_weights(model.teacher, model.teacher_weights)
    if model.teacher_mode not in _MODES or chosen == NONE:
        raise ConfigError(
            f"--teacher-mode {model.teacher_mode}: {short_name(model.teacher)} is an image-text "
            "model, which cannot be trained here; pass weights of it, and --teacher-mode auto, "
            "as-is or features"
        )
    if model.teacher_mode == "features":
        return None
    texts = texts_of(config, spec)
    weights = chosen if model.teacher_weights not in (None, "pretrained") else None
    try:
        describe_classes(
            teacher,
            family,
            family_name(model.teacher),
            weights,
            texts.class_names,
            texts.prompts,
        )
    except ConfigError as error:
        flag = f"--class-names {model.class_names}: " if model.class_names else ""
        raise ConfigError(f"{flag}{error}") from error
    return texts
