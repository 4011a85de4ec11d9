"""Checks of names and files that need neither torch nor MLflow, which take seconds to import."""

from __future__ import annotations

from raygkd.config import Config
from raygkd.data.sources import check_dataset
from raygkd.tracking.store import chosen_uri


def check_early(command: str, config: Config) -> None:
    """Check what a command that trains is told, as far as it takes no time.

    Args:
        command: its name.
        config: its settings.

    Raises:
        UserError: an unknown data set, a wrong space file, or no URI of an MLflow store.
    """
    chosen_uri(config.output.tracking_uri, config.output.output)
    check_dataset(config.data.dataset, config.data.data_dir)
    if command == "tune" and config.search.space:
        from raygkd.config.search_space import read_space

        read_space(config.search.space)
