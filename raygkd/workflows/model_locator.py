"""Find the file of a MODEL argument, and check where results can be written."""

from __future__ import annotations

import tempfile
from pathlib import Path

from raygkd.errors import ConfigError, DataError, ResourceError, StorageError
from raygkd.storage.atomic_files import Place, is_remote, local_path, make_folder, place
from raygkd.tracking.evaluation_runs import Origin
from raygkd.tracking.model_registry import Registered, registered
from raygkd.tracking.store import chosen_uri, default_uri, is_file
from raygkd.tracking.tags import FILE_TAG
from raygkd.workflows.resume import MODEL, RESULT
from raygkd.workflows.run_files import read_result

REGISTERED = "models:/"


def find_model(given: str, *, tracking_uri: str | None, output: str) -> Place:
    """Return the file of a model.

    Args:
        given: a file; the folder of a run; or ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``,
            whose run's folder must still exist.
        tracking_uri: of the MLflow store, for the last; None for the output folder's.
        output: folder of the runs.

    Raises:
        DataError: there is no such file.
        ConfigError: a URL that cannot be used.
        TrackingError: MLflow has no such model, or does not answer.
    """
    if given.startswith(REGISTERED):
        uri = chosen_uri(tracking_uri, output)
        return registered_file(given, registered(given, uri))
    path = place(given)
    if path.is_dir():
        if not (path / MODEL).exists():
            raise DataError(
                f"MODEL {given}: the folder has no {MODEL}; pass the folder of a finished run, "
                "such as raygkd-output/runs/NAME, or a model file"
            )
        return path / MODEL
    if not path.exists():
        raise DataError(
            f"MODEL {given}: no such file; pass one written by 'raygkd tune', 'raygkd train' or "
            "'raygkd teacher', the folder of its run, or models:/NAME@ALIAS"
        )
    return path


def registered_file(given: str, version: Registered) -> Place:
    """Return the file of a registered model's version.

    Args:
        given: the MODEL argument, for error messages.
        version: of the model.

    Raises:
        DataError: the file is no longer in its run's folder.
    """
    folder = place(version.folder)
    name = version.tags.get(FILE_TAG, MODEL)
    file = folder / name
    if not file.exists():
        raise DataError(f"MODEL {given}: its run's folder {folder} no longer has {name}")
    return file


def origin_of(given: str, path: Place, *, tracking_uri: str | None, output: str) -> Origin | None:
    """Return the MLflow run of a model; None for a file outside its run's folder.

    Args:
        given, tracking_uri, output: as for ``find_model``.
        path: what ``find_model`` returned.

    Raises:
        TrackingError: MLflow has no such model, or does not answer.
        DataError: the run's result is damaged.
    """
    if given.startswith(REGISTERED):
        uri = chosen_uri(tracking_uri, output)
        version = registered(given, uri)
        return Origin(uri=uri, run_id=version.run_id)
    file = path.parent / RESULT
    if path.name != MODEL or not file.exists():
        return None
    result = read_result(file)
    recorded = result["mlflow"]
    run_id = recorded.get("parent_run_id", recorded.get("run_id"))
    uri = tracking_uri or _moved_store(recorded["tracking_uri"], result.get("run"), path.parent)
    return None if run_id is None else Origin(uri=uri, run_id=run_id)


def _moved_store(uri: str, run: str | None, folder: Place) -> str:
    """Return the URI of a run's store; of a moved output folder that which is in it now.

    Args:
        uri: of the store when the run ended.
        run: its folder then; None if the result does not have it.
        folder: its folder now.
    """
    if run is None:
        return uri
    before = place(run).parent.parent
    if not is_file(uri) or uri != default_uri(before):
        return uri
    return default_uri(folder.parent.parent)


def new_file(option: str, given: str, suffixes: tuple[str, ...]) -> Place:
    """Return the path of a file to write.

    Args:
        option: name of the option that gives the path.
        given: its path.
        suffixes: that it may end with.

    Raises:
        ConfigError: another suffix, a folder, or a URL that cannot be used.
        ResourceError: nothing can be written there.
    """
    try:
        target = place(given)
    except ConfigError as error:
        raise ConfigError(f"{option} {error}") from error
    if not target.name.endswith(suffixes):
        raise ConfigError(f"{option} {given}: must end with {' or '.join(suffixes)}")
    if isinstance(target, Path):
        if target.is_dir():
            raise ConfigError(f"{option} {given}: is a folder; pass the path of a file")
        check_folder(option, target.parent)
    return target


def new_folder(option: str, given: str) -> Path:
    """Return a folder on this machine to write files to; create it if it is missing.

    Args:
        option: name of the option that gives the path.
        given: its path.

    Raises:
        ConfigError: a URL, or no path.
        ResourceError: it cannot be created or written.
    """
    if is_remote(given):
        raise ConfigError(f"{option} {given}: must be a local folder")
    try:
        folder = local_path(given)
    except ConfigError as error:
        raise ConfigError(f"{option} {error}") from error
    try:
        make_folder(folder)
    except (OSError, StorageError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).rpartition(": ")[2]
        raise ResourceError(f"{option} {given}: cannot be created: {reason}") from error
    check_folder(option, folder)
    return folder


def check_folder(option: str, folder: Path) -> None:
    """Refuse a folder that does not exist or is not writable.

    Raises:
        ResourceError: with the option and the reason.
    """
    if not folder.is_dir():
        raise ResourceError(f"{option}: there is no folder '{folder}': create it first")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ResourceError(
            f"{option}: '{folder}' cannot be written ({error.strerror}); choose another"
        ) from error
