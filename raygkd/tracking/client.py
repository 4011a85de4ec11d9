"""MLflow's client, with MLflow's own log messages switched off.

MLflow takes seconds to import, so only what uses a client does.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient


def silence_mlflow() -> None:
    """Switch MLflow's own log messages off.

    raygkd reports errors in one line; MLflow would add tracebacks and hints.
    """
    # sets the levels itself when it is imported
    import mlflow  # noqa: F401

    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.CRITICAL)


def client_of(uri: str) -> MlflowClient:
    """Return the client of a store or server, for its runs and its registered models."""
    silence_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)
