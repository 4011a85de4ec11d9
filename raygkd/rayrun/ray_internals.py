"""Private parts of Ray that raygkd depends on.

Ray may change them in any release: a test names those that have changed. Three more are where
torch is not loaded: ``JobSubmissionClient._server_ray_version`` in ``raygkd.rayrun.jobs``,
``ENABLE_RAY_CLUSTER`` in ``raygkd.rayrun.loopback``, and ``canonicalize_bootstrap_address`` in
``raygkd.rayrun.cluster``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.torch.config import _TorchBackend as TorchBackend
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import (
    DefaultFailurePolicy,
    FailureDecision,
)
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ScalingDecision,
)

__all__ = [
    "CountedRoom",
    "DefaultFailurePolicy",
    "FailureDecision",
    "NoopDecision",
    "PolicyTrainer",
    "ScalingDecision",
    "TorchBackend",
    "WorkerGroupStartupTimeoutError",
    "keep_credentials_here",
    "look_often",
]


class PolicyTrainer(TorchTrainer):
    """A trainer with its own policies that does not handle Ctrl-C.

    Ray's Ctrl-C handler takes long and exits the process itself.
    """

    def policies(self) -> dict[str, Any]:
        """Return the policies that replace Ray's: "failure_policy", "scaling_policy"."""
        return {}

    def _register_sigint_handler(self, controller: Any) -> None:
        pass

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        return super()._initialize_and_run_controller(**(parts | self.policies()))


class CountedRoom(ElasticScalingPolicy):
    """An elastic policy whose number of possible workers can be overridden."""

    def count_workers(self, reserved_resources: Mapping[str, Any]) -> int:
        """Return how many workers fit.

        Args:
            reserved_resources: node id -> resources reserved there.
        """
        return super()._count_possible_workers(reserved_resources)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        return self.count_workers(reserved_resources)


def keep_credentials_here() -> None:
    """Keep Tune from passing the AWS variables of this process to its trials.

    Ray writes the variables to the log of every node, and nodes have their own credentials.
    """
    from ray.tune.execution import class_cache

    class_cache.ENV_VARS_TO_PROPAGATE = {
        name for name in class_cache.ENV_VARS_TO_PROPAGATE if not name.startswith("AWS_")
    }


def look_often(seconds: float) -> None:
    """Make Ray Data check for finished tasks every so many seconds.

    The name is that of Ray 2.60. If another Ray has renamed it, the stream is only slower.
    """
    from ray.data._internal.execution import streaming_executor_state

    streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = seconds
