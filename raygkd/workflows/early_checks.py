"""Checks of names and files before what takes seconds to import: torch, Ray Tune and MLflow."""

from __future__ import annotations

from typing import Any

from raygkd.config import Config
from raygkd.data.sources import check_dataset
from raygkd.tracking.store import chosen_uri


def check_early(command: str, config: Config) -> None:
    """Check the settings of a command that trains, as far as it takes no time.

    Args:
        command: its name.
        config: its settings.

    Raises:
        UserError: an unknown data set, a wrong space file, no URI of an MLflow store, or models
            and settings of a search that ``check_names`` refuses.
    """
    chosen_uri(config.output.tracking_uri, config.output.output)
    check_dataset(config.data.dataset, config.data.data_dir)
    space: tuple[Any, ...] = ()
    if command == "tune" and config.search.space:
        from raygkd.config.search_space import read_space

        space = read_space(config.search.space)
    # needs torch, but not Ray Tune, which the search imports before it looks at them
    from raygkd.assembly.applicability import check_applies

    check_applies(command, config, space)
    if command == "tune":
        from raygkd.workflows.pair_checks import check_names, check_students

        check_students(config.search.students or ())
        check_names(config)
