"""MLflow's client, with MLflow's own log messages switched off.

MLflow takes seconds to import, so only what uses a client does.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient


def client_of(uri: str) -> MlflowClient:
    """Return the client of a store or server, for its runs and its registered models."""
    from mlflow import MlflowClient

    # raygkd reports errors in one line; MLflow, which sets these levels when it is imported, would
    # add tracebacks and hints
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.CRITICAL)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)
