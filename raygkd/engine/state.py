"""The checkpoint from which a run is resumed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raygkd.engine.distributed import gather
from raygkd.engine.loop import Training
from raygkd.errors import DataError, StorageError
from raygkd.models.files import read_tensors
from raygkd.storage.atomic_files import Place, make_folder, whole_file

FORMAT = "raygkd-checkpoint-5"


def _rng(training: Training) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if training.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(training.device)
    return state


def _part(training: Training) -> dict[str, Any] | None:
    """Return the completed part of the current epoch on this rank."""
    part = training.part
    if part is None:
        return None
    return {
        "meter": part.meter.state_dict(),
        "losses": part.losses.state_dict(),
        "gradient_norms": part.gradient_norms,
        "steps": part.steps,
        "seconds": part.seconds,
    }


def _learning(training: Training) -> dict[str, Any]:
    """Return the student that is trained, where its average is kept instead of it."""
    if training.averaged is None:
        return {}
    return {
        "student": training.objective.student.state_dict(),
        "steps": training.averaged.n_averaged,
    }


def save_checkpoint(path: Place, training: Training) -> None:
    """Write the state of a run; rank 0 writes, and every rank must call.

    The state is student, adapters, optimiser, schedule, scaler, epoch and its metrics, every rank's
    random state and part of the current epoch, and the configuration as YAML. "student" is the
    model to use, which may be an average; "learning" is then the student that is trained. The file
    is written completely or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    rng, parts = gather(_rng(training)), gather(_part(training))
    if training.rank != 0:
        return
    objective = training.objective
    state = {
        "format": FORMAT,
        "student": training.model.state_dict(),
        "learning": _learning(training),
        "adapters": objective.graph.state_dict() if objective.graph is not None else {},
        "baseline": objective.baseline.state_dict() if objective.baseline is not None else {},
        "units": objective.units.state_dict() if objective.units is not None else {},
        "optimizer": training.optimizer.state_dict(),
        "schedule": training.schedule.state_dict(),
        "scaler": training.scaler.state_dict(),
        "patience": training.patience.state_dict() if training.patience is not None else {},
        "epoch": training.epoch,
        "metrics": training.metrics,
        "parts": parts,
        "rng": rng,
        "config": training.config,
    }
    make_folder(path.parent)
    with whole_file(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)


def read_checkpoint(path: Place) -> dict[str, Any]:
    """Return the content of a checkpoint, on the CPU.

    Raises:
        DataError: the file is missing, damaged or not a checkpoint of raygkd.
        StorageError: the object store fails.
    """
    try:
        state = read_tensors(path)
    except OSError as error:
        raise DataError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    except StorageError:
        raise
    except Exception as error:
        raise DataError(f"{path} cannot be read as a checkpoint: it is damaged") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise DataError(f"{path} is not a checkpoint of this version of raygkd ({FORMAT})")
    return state


def restore(training: Training, state: dict[str, Any]) -> None:
    """Restore the state written by ``save_checkpoint``; every rank must call.

    Args:
        training: a run of the same configuration.
        state: result of ``read_checkpoint``.

    Raises:
        DataError: it was written in the middle of an epoch by a different number of ranks.
    """
    objective = training.objective
    training.model.load_state_dict(state["student"])
    if training.averaged is not None:
        objective.student.load_state_dict(state["learning"]["student"])
        training.averaged.n_averaged.copy_(state["learning"]["steps"])
    if training.patience is not None:
        training.patience.load_state_dict(state["patience"])
    if objective.graph is not None:
        objective.graph.load_state_dict(state["adapters"])
    if objective.baseline is not None:
        objective.baseline.load_state_dict(state["baseline"])
    if objective.units is not None:
        objective.units.load_state_dict(state["units"])
    training.optimizer.load_state_dict(state["optimizer"])
    training.schedule.load_state_dict(state["schedule"])
    training.scaler.load_state_dict(state["scaler"])
    training.epoch, training.metrics = state["epoch"], state["metrics"]
    _restore_part(training, state["parts"])
    # ranks that the checkpoint does not cover keep the seed of the epoch
    if training.rank < len(state["rng"]):
        rng = state["rng"][training.rank]
        torch.set_rng_state(rng["cpu"])
        if training.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], training.device)


def _restore_part(training: Training, parts: list[dict[str, Any] | None]) -> None:
    if parts[0] is None:
        return
    ranks = len(gather(training.rank))
    if ranks != len(parts):
        raise DataError(
            f"the checkpoint was written in the middle of an epoch by {len(parts)} worker(s); "
            f"resume with as many, not {ranks}"
        )
    state = parts[training.rank]
    assert state is not None
    part = training.part = training.new_part()
    part.meter.load_state_dict(state["meter"])
    part.losses.load_state_dict(state["losses"])
    part.gradient_norms = state["gradient_norms"]
    part.steps, part.seconds = state["steps"], state["seconds"]
