"""Classifiers and detectors, their levels and feature maps, and the files of their weights."""

from raygkd.models.by_name import build_model
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
from raygkd.models.families import ModelFamily, family_of, load_of_family, model_input
from raygkd.models.files import ModelFile, build_from_file, load_model_file, save_model_file
from raygkd.models.inputs import ModelInput
from raygkd.models.levels import check_levels, feature_shapes, stage_modules
from raygkd.models.named import NamedLevels
from raygkd.models.pairing import pair_levels
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
    "TORCHVISION_WEIGHTS",
    "Detector",
    "FeatureTap",
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
    "classifier_names",
    "count_parameters",
    "detector_names",
    "family_of",
    "feature_shapes",
    "inherit",
    "inheritable",
    "is_classifier",
    "is_detector",
    "load_model_file",
    "load_of_family",
    "load_weights",
    "model_input",
    "pair_levels",
    "save_model_file",
    "stage_modules",
    "torchvision_file",
]
