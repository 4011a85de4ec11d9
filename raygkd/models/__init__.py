"""Classifiers, their stages and feature maps, and the file a model is saved in for use."""

from raygkd.models.classifiers import build_classifier, classifier_names, count_parameters
from raygkd.models.files import ModelFile, build_from_file, load_model_file, save_model_file
from raygkd.models.levels import check_levels, feature_shapes, stage_modules
from raygkd.models.taps import FeatureTap

__all__ = [
    "FeatureTap",
    "ModelFile",
    "build_classifier",
    "build_from_file",
    "check_levels",
    "classifier_names",
    "count_parameters",
    "feature_shapes",
    "load_model_file",
    "save_model_file",
    "stage_modules",
]
