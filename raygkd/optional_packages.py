"""Packages that only some commands need."""

from __future__ import annotations

import importlib.util

from raygkd.errors import ConfigError

EXPORT = "export"


def require(*packages: str, of: str, extra: str = EXPORT) -> None:
    """Refuse what needs packages that are not installed.

    Args:
        packages: as they are imported.
        of: what needs them.
        extra: of this package, that installs them.

    Raises:
        ConfigError: names them and the command that installs them.
    """
    missing = [name for name in packages if not _is_there(name)]
    if missing:
        raise ConfigError(f"{of}: needs {', '.join(missing)}: pip install 'raygkd[{extra}]'")


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # it has been shut out of this process
        return False
