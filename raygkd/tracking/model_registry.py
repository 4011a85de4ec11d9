"""Registered models: their versions, and the aliases of those in use."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raygkd.errors import TrackingError
from raygkd.tracking.client import client_of
from raygkd.tracking.redaction import short_reason, shown
from raygkd.tracking.store import existing_store
from raygkd.tracking.tags import FOLDER_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient

# aliases of a registered model: the version in use, and the one that may take its place
CHAMPION, CHALLENGER = "champion", "challenger"


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A version of a registered model that was registered by a run of raygkd.

    Attributes:
        name: of the registered model.
        version: its number.
        tags: of the version.
        run_id: of the MLflow run it came from.
        folder: of that run.
    """

    name: str
    version: str
    tags: Mapping[str, str]
    run_id: str
    folder: str


def registered(model: str, uri: str) -> Registered:
    """Return a version of a registered model.

    Args:
        model: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        uri: of the store or server.

    Raises:
        TrackingError: there is no such model or run, or the server does not answer.
    """
    parts = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/([0-9]+))", model)
    if parts is None:
        raise TrackingError(f"MODEL {model}: must be models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = parts.groups()
    client = existing_store(f"MODEL {model}", uri)
    try:
        if alias:
            version = client.get_model_version_by_alias(name, alias)
        else:
            version = client.get_model_version(name, number)
        tags = client.get_run(version.run_id).data.tags if version.run_id else {}
    except Exception as error:
        raise TrackingError(f"MODEL {model}: {short_reason(error, uri)} ({shown(uri)})") from error
    if version.run_id is None or FOLDER_TAG not in tags:
        raise TrackingError(
            f"MODEL {model}: was not registered by raygkd; pass a model that 'raygkd tune' has "
            "registered"
        )
    return Registered(
        name=name,
        version=str(version.version),
        tags=dict(version.tags),
        run_id=version.run_id,
        folder=tags[FOLDER_TAG],
    )


def aliases(name: str, uri: str) -> dict[str, str]:
    """Return alias -> version of a registered model.

    Args:
        name: of the registered model.
        uri: of the store or server.

    Raises:
        TrackingError: there is no such model, or the server does not answer.
    """
    client = existing_store(f"NAME {name}", uri)
    try:
        found = client.get_registered_model(name).aliases
    except Exception as error:
        raise TrackingError(f"NAME {name}: {short_reason(error, uri)} ({shown(uri)})") from error
    return {alias: str(version) for alias, version in found.items()}


def decide(candidate: Registered, uri: str, *, promoted: bool, tags: Mapping[str, str]) -> None:
    """Tag a version with its comparison to the champion, and make it the champion if it won.

    Args:
        candidate: the version.
        uri: of the store or server.
        promoted: whether it becomes the champion, and no longer is the challenger.
        tags: for the version.

    Raises:
        TrackingError: the server does not answer, or rejects the request.
    """
    client = client_of(uri)
    try:
        for name, value in tags.items():
            client.set_model_version_tag(candidate.name, candidate.version, name, value)
        if promoted:
            client.set_registered_model_alias(candidate.name, CHAMPION, candidate.version)
            client.delete_registered_model_alias(candidate.name, CHALLENGER)
    except Exception as error:
        raise TrackingError(
            f"NAME {candidate.name}: {short_reason(error, uri)} ({shown(uri)})"
        ) from error


def register(
    client: MlflowClient, name: str, logged: Any, tags: Mapping[str, str], description: str
) -> tuple[str, str]:
    """Register a version of a model, unless its run has one already; return its number and alias.

    Every step is done once or found done, so a process that was killed at any moment may call it
    again.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = _version_of(client, name, logged.source_run_id)
    if version is None:
        version = client.create_model_version(
            name,
            # its place, and not its models:/ URI, which a store would look up at the global
            # tracking URI
            logged.artifact_location,
            run_id=logged.source_run_id,
            model_id=logged.model_id,
            tags=dict(tags),
            description=description,
        ).version
    held = client.get_registered_model(name).aliases
    own = [alias for alias in (CHAMPION, CHALLENGER) if str(held.get(alias)) == str(version)]
    alias = own[0] if own else CHALLENGER if CHAMPION in held else CHAMPION
    if not own:
        client.set_registered_model_alias(name, alias, str(version))
    link = json.dumps([{"name": name, "version": str(version)}])
    client.set_logged_model_tags(logged.model_id, {"mlflow.modelVersions": link})
    return str(version), alias


def _version_of(client: MlflowClient, name: str, run_id: str) -> str | None:
    """Return the version of a model that a run has registered, or None."""
    found = client.search_model_versions(f"run_id = '{run_id}'")
    numbers = [int(version.version) for version in found if version.name == name]
    return str(min(numbers)) if numbers else None
