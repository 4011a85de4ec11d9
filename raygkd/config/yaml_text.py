"""Settings as YAML."""

from __future__ import annotations

import functools
import re
from typing import Any

from raygkd.config.tree import Config, from_mapping, to_mapping
from raygkd.errors import ConfigError


def to_yaml(config: Config) -> str:
    """Return a configuration as YAML, which ``--config`` accepts."""
    import yaml

    return yaml.safe_dump(to_mapping(config), sort_keys=False)


def from_yaml(text: str, *, where: str) -> Config:
    """Build a Config from YAML; ConfigError names ``where`` and the line of a syntax error."""
    return from_mapping(yaml_mapping(text, where=where), where=where)


def yaml_mapping(text: str | bytes, *, where: str) -> dict[str, Any]:
    """Parse YAML as a mapping; ConfigError if it is not valid YAML or not a mapping."""
    import yaml

    try:
        tree = yaml.load(text, _loader())
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            mark = error.problem_mark
            reason = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
        raise ConfigError(f"{where}: not valid YAML: {reason}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: must contain keys and values, not {type(tree).__name__}")
    return tree


@functools.cache
def _loader() -> Any:
    """Return the safe loader, for which 1:2 is a pair of levels and not 62, a number to base 60."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    pair = ("tag:yaml.org,2002:str", re.compile(r"[0-9]+:[0-9]+"))
    Loader.yaml_implicit_resolvers = {
        first: [pair, *known] if first in "0123456789" and first else known
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Loader
