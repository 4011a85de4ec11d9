"""Checks before a run starts: output folder, lasting paths, and room on the cluster."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from raygkd.assembly.compatibility import loads_weights
from raygkd.assembly.models import is_model_file
from raygkd.config import Config, with_settings
from raygkd.errors import ConfigError, ResourceError, StorageError, TrackingError
from raygkd.models import NONE, PRETRAINED, TORCHVISION_WEIGHTS, source_file
from raygkd.rayrun import cluster
from raygkd.rayrun.node_monitor import require_shared
from raygkd.storage.atomic_files import Place, make_folder, place, whole_file, write_text
from raygkd.storage.temporary import MIB, remove_left_folders, remove_unfinished_files
from raygkd.workflows.resume import INPUTS, lasting_name, lasting_path


def output_folder(given: str) -> Place:
    """Return the absolute output folder; create it if it is missing.

    Raises:
        ConfigError: a URL that cannot be used.
        ResourceError: it cannot be written.
    """
    try:
        folder = place(given)
    except ConfigError as error:
        raise ConfigError(f"--output {error}") from error
    probe = folder / f".writable-{secrets.token_hex(4)}"
    try:
        write_text(probe, "")
        probe.unlink()
    except (OSError, StorageError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ResourceError(
            f"--output {given}: cannot be written ({reason}); choose another folder"
        ) from error
    return folder


def tell_what_is_removed(folder: Place, console: Console) -> None:
    """Remove the temporary folders and unfinished files of killed processes; print how much.

    Args:
        folder: of a run that this process owns.
        console: for the line.
    """
    folders, size = remove_left_folders()
    files = 0
    if isinstance(folder, Path):
        files, more = remove_unfinished_files(folder)
        size += more
    if folders or files:
        console.print(
            f"removed what killed processes left: {folders} temporary folder(s) and {files} "
            f"unfinished file(s), {size / MIB:.1f} MiB",
            soft_wrap=True,
        )


def with_lasting_paths(config: Config, output: Place) -> Config:
    """Return the configuration with paths that stay valid in another folder or job."""
    paths = {
        "data_dir": config.data.data_dir,
        "unlabelled": config.data.unlabelled,
        "output": config.output.output,
        "space": config.search.space,
        "warm_start": config.search.warm_start,
        "start_from": config.train.start_from,
        "teacher_classes": config.model.teacher_classes,
        "class_names": config.model.class_names,
        "prompts": config.model.prompts,
        "teacher": config.model.teacher if is_model_file(config.model.teacher) else None,
    }
    names = {}
    for role in ("teacher", "student"):
        model = getattr(config.model, role)
        if not is_model_file(model) and lasting_name(model, output) != model:
            names[role] = lasting_name(model, output)
            keep_source(model, output)
        weights = getattr(config.model, f"{role}_weights")
        is_name = weights in (*TORCHVISION_WEIGHTS, PRETRAINED, NONE) or (
            weights is not None
            and loads_weights(getattr(config.model, role))
            and not place(weights).exists()
        )
        paths[f"{role}_weights"] = None if is_name else weights
    lasting: dict[str, Any] = {}
    for name, path in paths.items():
        if path is not None:
            lasting[name] = lasting_path(path, output)
            copy = place(lasting[name])
            if copy.parent == output / INPUTS:
                _copy_input(place(path), copy)
    students = config.search.students
    if students is not None:
        lasting["students"] = tuple(lasting_name(one, output) for one in students)
    return with_settings(config, {**lasting, **names})


def keep_source(model: str, output: Place) -> None:
    """Copy FILE.py of a model FILE.py:FUNCTION to where its lasting name says; see there."""
    if (source := source_file(model)) is not None:
        _copy_input(place(source), place(str(source_file(lasting_name(model, output)))))


def keep_model(name: str, output: Place) -> None:
    """Copy what a model's lasting name says is among the inputs: FILE.py, or a model file."""
    if not is_model_file(name):
        keep_source(name, output)
    elif (copy := place(lasting_path(name, output))).parent == output / INPUTS:
        _copy_input(place(name), copy)


def _copy_input(path: Place, copy: Place) -> None:
    if not copy.exists():
        make_folder(copy.parent)
        with whole_file(copy) as temporary:
            temporary.write_bytes(path.read_bytes())


def require_one_truth(output: Place, uri: str) -> None:
    """Refuse outputs that not all nodes of the cluster can reach.

    Raises:
        ResourceError: an output folder that is not visible on all nodes.
        TrackingError: an MLflow store that is a file.
    """
    if uri.startswith("sqlite"):
        raise TrackingError(
            f"--tracking-uri {uri}: the nodes of this cluster cannot share a file as their store; "
            "pass the URL of an MLflow server ('raygkd ui --host' starts one)"
        )
    if isinstance(output, Path):
        witness = output / f".seen-{secrets.token_hex(4)}"
        witness.touch()
        try:
            require_shared("--output", output, witness)
        finally:
            witness.unlink()


def require_room(config: Config, nodes: Sequence[cluster.Resources], data_cpus: float) -> int:
    """Return how many runs fit at once, each with its maximum number of workers.

    Raises:
        ResourceError: not even one run with the minimum number of workers fits.
    """
    cluster.require_room(nodes, bundles_of(config, fewest=True), data_cpus=data_cpus)
    return max(1, cluster.places(nodes, bundles_of(config), data_cpus=data_cpus))


def bundles_of(config: Config, *, fewest: bool = False) -> list[cluster.Resources]:
    """Return the resources of a run with its maximum number of workers, or the minimum."""
    workers = config.cluster.workers
    return cluster.run_bundles(
        config.cluster,
        config.cluster.cpus_per_worker or 1.0,
        workers.least if fewest else workers.most,
    )
