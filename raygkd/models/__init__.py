"""Classifiers and detectors, their levels and feature maps, and the files of their weights."""

from raygkd.models.by_name import build_model, check_model_name
from raygkd.models.class_names import class_places, read_class_names
from raygkd.models.class_selection import with_classes
from raygkd.models.classifiers import (
    build_classifier,
    classifier_names,
    count_parameters,
    is_classifier,
)
from raygkd.models.detectors import (
    MOST_DETECTIONS,
    Detector,
    build_detector,
    check_image_size,
    detector_names,
    is_detector,
)
from raygkd.models.families import (
    ModelFamily,
    family_name,
    family_of,
    is_function,
    model_input,
    short_name,
    source_file,
)
from raygkd.models.files import ModelFile, build_from_file, load_model_file, save_model_file
from raygkd.models.function_family import errors_told
from raygkd.models.inputs import ModelInput
from raygkd.models.levels import check_levels, feature_shapes, stage_modules
from raygkd.models.loaded_weights import LoadedWeights
from raygkd.models.named import NamedLevels
from raygkd.models.pairing import pair_levels
from raygkd.models.starting_weights import (
    NONE,
    PRETRAINED,
    check_weights,
    known_class_names,
    load_classifier,
    starts_trained,
)
from raygkd.models.taps import FeatureTap
from raygkd.models.weights import (
    TORCHVISION_WEIGHTS,
    inherit,
    inheritable,
    load_weights,
    torchvision_file,
)

__all__ = [
    "MOST_DETECTIONS",
    "NONE",
    "PRETRAINED",
    "TORCHVISION_WEIGHTS",
    "Detector",
    "FeatureTap",
    "LoadedWeights",
    "ModelFamily",
    "ModelFile",
    "ModelInput",
    "NamedLevels",
    "build_classifier",
    "build_detector",
    "build_from_file",
    "build_model",
    "check_image_size",
    "check_levels",
    "check_model_name",
    "check_weights",
    "class_places",
    "classifier_names",
    "count_parameters",
    "detector_names",
    "errors_told",
    "family_name",
    "family_of",
    "feature_shapes",
    "inherit",
    "inheritable",
    "is_classifier",
    "is_detector",
    "is_function",
    "known_class_names",
    "load_classifier",
    "load_model_file",
    "load_weights",
    "model_input",
    "pair_levels",
    "read_class_names",
    "save_model_file",
    "short_name",
    "source_file",
    "stage_modules",
    "starts_trained",
    "torchvision_file",
    "with_classes",
]
