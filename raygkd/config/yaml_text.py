"""Settings as YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raygkd.config.tree import Config, from_mapping, to_mapping
from raygkd.errors import ConfigError, brief
from raygkd.storage.atomic_files import place
from raygkd.storage.reading import MOST_SETTINGS_BYTES, decode_text, parse_yaml, read_bytes


def to_yaml(config: Config) -> str:
    """Return a configuration as YAML, which ``--config`` accepts."""
    import yaml

    return yaml.safe_dump(to_mapping(config), sort_keys=False)


def from_yaml(text: str, *, where: str) -> Config:
    """Build a Config from YAML; ConfigError names ``where`` and the line of a syntax error."""
    return from_mapping(yaml_mapping(text, where=where), where=where)


def read_yaml(path: str, *, option: str) -> dict[str, Any]:
    """Return the mapping in a YAML file that a person wrote.

    Args:
        path: of the file.
        option: that names it, for messages.

    Raises:
        ConfigError: the file cannot be read, is not valid YAML, or has no mapping.
    """
    try:
        text = read_bytes(place(path), most=MOST_SETTINGS_BYTES)
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be read: {error.strerror}") from error
    except ConfigError as error:
        raise ConfigError(f"{option} {error}") from error
    return yaml_mapping(text, where=path)


def read_run_config(path: Any) -> Config:
    """Return the configuration of a run, which names every section.

    Args:
        path: of the run's config.yaml.

    Raises:
        ConfigError: the file cannot be read, is damaged, or holds other settings.
    """
    try:
        text = decode_text(read_bytes(path, most=MOST_SETTINGS_BYTES), path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    tree = yaml_mapping(text, where=str(path))
    if not tree:
        raise ConfigError(f"{path}: is empty; restore it, or start another run")
    return from_mapping(tree, where=str(path))


def recorded_settings(text: str, *, where: str) -> dict[str, dict[str, Any]]:
    """Return the settings that a model file records, by section; empty if it records none.

    Raises:
        ConfigError: they are not valid YAML, or a section has no settings.
    """
    tree = yaml_mapping(text, where=where)
    for section, leaves in tree.items():
        if not isinstance(leaves, Mapping):
            raise ConfigError(f"{where}: {brief(section)} must contain settings")
    return tree


def yaml_mapping(text: str | bytes, *, where: str) -> dict[str, Any]:
    """Parse YAML as a mapping; ConfigError if it is not valid YAML or not a mapping."""
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: must contain keys and values, not {type(tree).__name__}")
    return tree
