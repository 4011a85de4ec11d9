"""The checkpoint a run is resumed from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raygkd.engine.distributed import gather
from raygkd.engine.loop import Training
from raygkd.errors import DataError
from raygkd.files import whole_file
from raygkd.models.files import read_tensors

FORMAT = "raygkd-checkpoint-1"


def _rng(training: Training) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if training.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(training.device)
    return state


def save_checkpoint(path: Path, training: Training) -> None:
    """Write all that changes in a run; rank 0 writes, and every rank must call.

    Student, adapters, optimiser, schedule, scaler, epoch, every rank's random state, and the
    configuration as YAML. The file appears whole or not at all.
    """
    rng = gather(_rng(training))
    if training.rank != 0:
        return
    objective = training.objective
    state = {
        "format": FORMAT,
        "student": objective.student.state_dict(),
        "adapters": objective.graph.state_dict() if objective.graph is not None else {},
        "optimizer": training.optimizer.state_dict(),
        "schedule": training.schedule.state_dict(),
        "scaler": training.scaler.state_dict(),
        "epoch": training.epoch,
        "rng": rng,
        "config": training.config,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        torch.save(state, temporary)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint's content on the CPU.

    Raises:
        DataError: the file is missing, damaged or no checkpoint of raygkd.
    """
    try:
        state = read_tensors(path)
    except OSError as error:
        raise DataError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    except Exception as error:
        raise DataError(f"{path} cannot be read as a checkpoint: it is damaged") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise DataError(f"{path} is no checkpoint of this version of raygkd ({FORMAT})")
    return state


def restore(training: Training, state: dict[str, Any]) -> None:
    """Put a run back to where ``save_checkpoint`` found it; every rank must call.

    Args:
        training: a run of the same configuration.
        state: what ``read_checkpoint`` gave.
    """
    objective = training.objective
    objective.student.load_state_dict(state["student"])
    if objective.graph is not None:
        objective.graph.load_state_dict(state["adapters"])
    training.optimizer.load_state_dict(state["optimizer"])
    training.schedule.load_state_dict(state["schedule"])
    training.scaler.load_state_dict(state["scaler"])
    training.epoch = state["epoch"]
    # with another number of ranks the states do not fit, and each epoch seeds itself anyway
    if training.rank < len(state["rng"]):
        rng = state["rng"][training.rank]
        torch.set_rng_state(rng["cpu"])
        if training.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], training.device)
