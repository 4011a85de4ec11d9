"""MLflow's client, and what MLflow may say by itself: nothing."""

from __future__ import annotations

import logging

from mlflow import MlflowClient

# what goes wrong is told by raygkd in one line; MLflow, which sets these levels when it is
# imported, would add tracebacks and hints
logging.getLogger("mlflow").setLevel(logging.CRITICAL)
logging.getLogger("alembic").setLevel(logging.CRITICAL)


def client_of(uri: str) -> MlflowClient:
    """Return the client of a store or server, for its runs and its registered models."""
    return MlflowClient(tracking_uri=uri, registry_uri=uri)
