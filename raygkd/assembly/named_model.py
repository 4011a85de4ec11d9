"""A finished model that is a name with weights, instead of a model file."""

from __future__ import annotations

from raygkd.assembly.compatibility import check_kind
from raygkd.assembly.models import new_model, student_file
from raygkd.config import Config, with_settings
from raygkd.data.spec import ImageSpec
from raygkd.errors import ConfigError
from raygkd.models import LoadedWeights, ModelFile, load_classifier, short_name, source_file
from raygkd.storage.atomic_files import place


def named_model_file(
    config: Config, name: str, weights: str | None, spec: ImageSpec
) -> tuple[ModelFile, LoadedWeights]:
    """Return the model file of a classifier's name with its weights, and what was loaded.

    Args:
        config: whose data the images are of.
        name: of the classifier.
        weights: "pretrained" or a file; None for the pretrained ones.
        spec: of the images.

    Raises:
        ConfigError: an unknown name, a detector, or weights that are not of these classes.
        DataError: the weights cannot be had or do not fit.
    """
    check_kind(name, spec.task)
    classes = len(spec.class_names)
    model = new_model(name, spec)
    loaded = load_classifier(model, name, classes, weights)
    if loaded is None or not loaded.is_whole:
        reason = (
            "its weights are random"
            if loaded is None
            else (
                f"{', '.join(loaded.new_layers)} starts at random for the {classes} classes of "
                "these images"
            )
        )
        raise ConfigError(
            f"{short_name(name)} is not trained for these images ({reason}); pass --weights FILE "
            "of a model with these classes"
        )
    source = source_file(name)
    if source is not None:
        name = f"{place(source)}:{name.rpartition(':')[2]}"
    config = with_settings(config, {"student": name, "method": "none"})
    return student_file(config, spec, model.state_dict(), {}, loaded), loaded
