"""What runs in the controller of a TorchTrainer, a process that nothing heavy is imported for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray.exceptions import RayTaskError
from ray.train.v2._internal.execution.failure_handling import (
    DefaultFailurePolicy,
    FailureDecision,
)
from ray.train.v2.api.callback import UserCallback

from raygkd.errors import RunFailed, UserError
from raygkd.files import append_line, whole_lines


class MetricsJournal(UserCallback):
    """Appends rank 0's metrics of each epoch to a file, once.

    Ray runs it in the controller process, which is on the driver's machine; the driver reads the
    file as it grows, and it is the record on disk that training leaves.
    """

    def __init__(self, path: Path):
        self.path = path

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Write one line."""
        if len(whole_lines(self.path)) < metrics[0]["epoch"]:
            append_line(self.path, json.dumps(metrics[0]))


class FaultsAlone(DefaultFailurePolicy):
    """Starts the workers again after a fault, and not after what would only come again."""

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Return whether to start them again."""
        if known_cause(training_failed_error) is not None:
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


def known_cause(error: BaseException) -> UserError | RunFailed | None:
    """Return the user's mistake or known failure behind an error that came through Ray."""
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
