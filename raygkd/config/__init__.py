"""One tree of settings for a run: keyword-only dataclasses, YAML in and out, all problems at once.

The search space is in ``raygkd.config.search_space``, which needs torch.
"""

from raygkd.config.defaults import DATASET_DEFAULTS
from raygkd.config.schema import (
    LARGEST_SEED,
    METHODS,
    SECTIONS,
    ClusterConfig,
    CompareConfig,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    SearchConfig,
    is_choice,
    settings,
)
from raygkd.config.tree import Config, check_keys, from_mapping, given, to_mapping, with_settings
from raygkd.config.values import WorkerRange, base_type, coerce, fingerprint, flag
from raygkd.config.yaml_text import from_yaml, to_yaml, yaml_mapping

__all__ = [
    "DATASET_DEFAULTS",
    "LARGEST_SEED",
    "METHODS",
    "SECTIONS",
    "ClusterConfig",
    "CompareConfig",
    "Config",
    "DataConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimConfig",
    "OutputConfig",
    "SearchConfig",
    "WorkerRange",
    "base_type",
    "check_keys",
    "coerce",
    "fingerprint",
    "flag",
    "from_mapping",
    "from_yaml",
    "given",
    "is_choice",
    "settings",
    "to_mapping",
    "to_yaml",
    "with_settings",
    "yaml_mapping",
]
