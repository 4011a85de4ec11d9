"""Policies in the controller of a TorchTrainer, which imports nothing heavy."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayTaskError

from raygkd.errors import RunFailed, UserError
from raygkd.rayrun.ray_internals import (
    CountedRoom,
    DefaultFailurePolicy,
    FailureDecision,
    NoopDecision,
    ScalingDecision,
    WorkerGroupStartupTimeoutError,
)

# that a node has to answer before workers are put there
ANSWER_SECONDS = 1.0


class FaultsAlone(DefaultFailurePolicy):
    """Restarts the workers after a failure, except for failures that would repeat."""

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Return whether to restart them."""
        if known_cause(training_failed_error) is not None:
            return FailureDecision.RAISE
        cause = getattr(training_failed_error, "controller_failure", None)
        if isinstance(cause, WorkerGroupStartupTimeoutError):
            # there is no room now, and waiting for a node does not count as a failure
            return FailureDecision.RETRY
        return super().make_decision(training_failed_error)


class RoomPolicy(CountedRoom):
    """Starts as many workers as fit, if the batch can be split over their number.

    The number of running workers only changes after an epoch, once its checkpoint is written.

    Args:
        scaling_config: minimum and maximum number of workers.
        batch_size: images per step, summed over all workers.
    """

    def __init__(self, scaling_config: Any, batch_size: int):
        super().__init__(scaling_config)
        self._batch_size = batch_size

    def count_workers(self, reserved_resources: Mapping[str, Any]) -> int:
        """Return how many workers to start on the nodes that respond."""
        # Ray needs 12 to 15 s to see that a node is lost, and workers placed there never start
        answering = {
            node["NodeID"]
            for node in ray.nodes()
            if node["NodeID"] in reserved_resources
            and _answers(node["NodeManagerAddress"], node["NodeManagerPort"])
        }
        room = super().count_workers(
            {node: has for node, has in reserved_resources.items() if node in answering}
        )
        return max((n for n in range(1, room + 1) if self._batch_size % n == 0), default=0)

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Return whether to restart with another number of workers."""
        workers = worker_group_status.worker_statuses.values()
        if not all(worker.training_report for worker in workers):
            return NoopDecision()
        return super().make_decision_for_running_worker_group(
            worker_group_state, worker_group_status
        )


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def known_cause(error: BaseException) -> UserError | RunFailed | None:
    """Return the user error or known failure that caused an error from Ray."""
    queue: list[BaseException | None] = [error]
    seen: set[int] = set()
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        # Ray's form of an error is one of its class too, with a traceback for its text
        if isinstance(current, UserError | RunFailed) and not isinstance(current, RayTaskError):
            return current
        queue += [current.__cause__, current.__context__]
        queue += [getattr(current, "cause", None)]
        queue += list(getattr(current, "worker_failures", {}).values())
    return None
