"""The sizes of images that teacher and student take."""

from __future__ import annotations

from raygkd.assembly.models import is_model_file
from raygkd.config import Config, with_settings
from raygkd.data.run_images import DEFAULT_SIZE, task_of
from raygkd.models import is_classifier, load_model_file, model_input, starts_trained


def with_teacher_size(config: Config) -> Config:
    """Return a configuration that says the teacher's input size where its weights have one.

    Raises:
        DataError: the teacher is a file that cannot be read.
    """
    name = config.model.teacher
    if config.data.teacher_image_size is not None or task_of(config.data.dataset) == "detection":
        return config
    size = None
    if is_model_file(name):
        file = load_model_file(name)
        size = file.image_size if is_classifier(file.name) else None
    elif is_classifier(name) and starts_trained(name, config.model.teacher_weights):
        size = model_input(name).size
    return config if size is None else with_settings(config, {"teacher_image_size": size[0]})


def default_side(config: Config) -> int:
    """Return the side of the student's input in pixels where neither images nor settings say."""
    size = model_input(config.model.student).size
    return size[0] if size is not None else DEFAULT_SIZE
