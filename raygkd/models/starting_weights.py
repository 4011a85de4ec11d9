"""The weights that a classifier starts from: those of its library, a file, or random ones."""

from __future__ import annotations

from torch import nn

from raygkd.errors import ConfigError
from raygkd.models.checkpoints import load_file, read_state
from raygkd.models.class_names import class_names_in
from raygkd.models.families import family_name, family_of, short_name
from raygkd.models.loaded_weights import LoadedWeights

PRETRAINED, NONE = "pretrained", "none"
OF_DETECTORS = ("imagenet", "coco")


def chosen_weights(name: str, given: str | None) -> str:
    """Return what a classifier starts from: "pretrained", "none", or a file.

    Args:
        name: of the classifier.
        given: what the settings say; None for "pretrained" where its library has weights.

    Raises:
        ConfigError: pretrained weights are wanted of a model that has none, or those of detectors.
    """
    if given in OF_DETECTORS:
        raise ConfigError(
            f"{given}: is for detectors; a classifier takes pretrained, none, or a weights file"
        )
    family = family_of(name)
    has_weights = family is not None and family.pretrained(family_name(name)) is not None
    if given is None:
        return PRETRAINED if has_weights else NONE
    if given == PRETRAINED and not has_weights:
        raise ConfigError(
            f"pretrained: there are no weights of {short_name(name)} (allowed: none, or a weights "
            "file)"
        )
    return given


def starts_trained(name: str, given: str | None) -> bool:
    """Return whether a classifier starts from trained weights; see ``chosen_weights``."""
    return chosen_weights(name, given) != NONE


def check_weights(name: str, given: str | None) -> None:
    """Refuse weights of a classifier as far as is possible before its classes are known.

    Raises:
        ConfigError: pretrained weights of a model that has none.
        DataError: a file that cannot be read.
    """
    weights = chosen_weights(name, given)
    if weights not in (NONE, PRETRAINED):
        read_state(weights)


def known_class_names(name: str, given: str | None) -> tuple[str, ...]:
    """Return the names of the classes of the weights that a classifier starts from, in the order of
    their logits; () where nothing says them.

    Raises:
        UserError: the weights cannot be had.
    """
    weights = chosen_weights(name, given)
    family = family_of(name)
    if weights == NONE:
        return ()
    if weights == PRETRAINED and family is not None:
        return family.class_names(family_name(name))
    return class_names_in(weights)


def load_classifier(
    model: nn.Module, name: str, num_classes: int, given: str | None
) -> LoadedWeights | None:
    """Load into a classifier what it starts from; return what that is, None for random weights.

    Args:
        model: that ``build_model`` returned.
        name: of the model.
        num_classes: of the model.
        given: "pretrained", "none", a file, or None; see ``chosen_weights``.

    Raises:
        UserError: the weights cannot be had or do not fit.
    """
    weights = chosen_weights(name, given)
    family = family_of(name)
    if weights == NONE:
        return None
    if family is None:
        return load_file(model, weights, num_classes)
    own = family_name(name)
    if weights == PRETRAINED:
        return family.load_pretrained(model, own, num_classes)
    loaded = family.load_file(model, own, num_classes, weights)
    return loaded if loaded is not None else load_file(model, weights, num_classes)
