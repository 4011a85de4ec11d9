"""Packages that only some commands need."""

from __future__ import annotations

import importlib.util

from raygkd.errors import ConfigError

EXPORT = "export"


def require(*packages: str, of: str, extra: str = EXPORT) -> None:
    """Check that optional packages are installed.

    Args:
        packages: import names of the packages.
        of: option or file that needs them, for the message.
        extra: extra of this package that installs them.

    Raises:
        ConfigError: some are missing; names them and the command that installs them.
    """
    missing = [name for name in packages if not _is_installed(name)]
    if missing:
        raise ConfigError(f"{of}: needs {', '.join(missing)}: pip install 'raygkd[{extra}]'")


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # its import is blocked in this process
        return False
