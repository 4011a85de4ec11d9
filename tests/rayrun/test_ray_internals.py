"""The private parts of Ray that raygkd depends on are still where it looks for them."""

from __future__ import annotations

import importlib
import inspect

import pytest

EXECUTION = "ray.train.v2._internal.execution"
# module, name in it, and the arguments that it is called with
PARTS = {
    "ray.train.torch.config:_TorchBackend.on_start": ["self", "worker_group", "backend_config"],
    "ray.train.v2._internal.exceptions:WorkerGroupStartupTimeoutError": None,
    f"{EXECUTION}.failure_handling:FailureDecision.RAISE": None,
    f"{EXECUTION}.failure_handling:FailureDecision.RETRY": None,
    f"{EXECUTION}.failure_handling:DefaultFailurePolicy.make_decision": [
        *("self", "training_failed_error"),
    ],
    f"{EXECUTION}.scaling_policy:NoopDecision": [],
    f"{EXECUTION}.scaling_policy:ScalingDecision": None,
    f"{EXECUTION}.scaling_policy:ElasticScalingPolicy._count_possible_workers": [
        *("self", "reserved_resources"),
    ],
    f"{EXECUTION}.scaling_policy:ElasticScalingPolicy.make_decision_for_running_worker_group": [
        *("self", "worker_group_state", "worker_group_status"),
    ],
    "ray.train.torch:TorchTrainer._register_sigint_handler": ["self", "controller"],
    "ray.train.torch:TorchTrainer._initialize_and_run_controller": [
        *("self", "controller_init_kwargs"),
    ],
    "ray._private.ray_constants:ENABLE_RAY_CLUSTER": None,
    "ray._private.services:canonicalize_bootstrap_address": ["addr", "temp_dir"],
    "ray.tune.execution.class_cache:ENV_VARS_TO_PROPAGATE": None,
    "ray.data._internal.execution.streaming_executor_state:WAIT_FOR_TASK_COMPLETION_TIMEOUT_S": (
        None
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_private_part_of_ray_has_not_moved(part: str) -> None:
    module, _, path = part.partition(":")
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    arguments = PARTS[part]
    if arguments is not None:
        assert list(inspect.signature(found).parameters) == arguments


def test_a_client_of_jobs_knows_the_version_of_its_cluster() -> None:
    source = inspect.getsource(importlib.import_module("ray.dashboard.modules.job.sdk"))
    parent = inspect.getsource(importlib.import_module("ray.dashboard.modules.dashboard_sdk"))
    assert "_server_ray_version" in source + parent
