"""The files under cluster/, and what Ray, the clouds, KubeRay and Kubernetes make of them."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import click
import jsonschema
import msgspec
import ray
import yaml
from lightkube.models import apps_v1, core_v1, networking_v1
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

FOLDER = Path(__file__).parents[2] / "cluster"
SCHEMAS = Path(__file__).parents[1] / "schemas"
# Kubernetes' structures that the files, or KubeRay's, have in them
_KUBERNETES = [
    apps_v1.Deployment,
    core_v1.EnvVar,
    core_v1.PersistentVolumeClaim,
    core_v1.PodTemplateSpec,
    core_v1.SecurityContext,
    core_v1.Service,
    networking_v1.IngressTLS,
    networking_v1.NetworkPolicyEgressRule,
    networking_v1.NetworkPolicyIngressRule,
]
_REFUSALS = (
    AssertionError,
    KeyError,
    ValueError,
    click.ClickException,
    jsonschema.ValidationError,
)
# whose keys are names that a user gives
_NAMES = {
    "available_node_types",
    "file_mounts",
    "limits",
    "matchLabels",
    "labels",
    "rayStartParams",
    "requests",
    "resources",
    "selector",
}


def text(name: str) -> str:
    return (FOLDER / name).read_text()


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text(name)))


def _closed(schema: Any) -> Any:
    """Return a JSON schema whose objects have the keys that it names and no others."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if schema.get("type") == "object" and "properties" in schema:
        closed["additionalProperties"] = False
    return closed


@cache
def _ray_up_schema() -> jsonschema.Draft7Validator:
    path = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    return jsonschema.Draft7Validator(_closed(json.loads(path.read_text())))


@cache
def _instance_schema() -> jsonschema.Draft202012Validator:
    fields = _closed(yaml.safe_load((SCHEMAS / "gce-instance.yaml").read_text()))
    return jsonschema.Draft202012Validator({"$ref": "#/$defs/Instance", "$defs": fields})


@cache
def _manifest_schema(kind: str) -> jsonschema.Draft202012Validator:
    _, kubernetes = msgspec.json.schema_components(_KUBERNETES)
    kuberay = yaml.safe_load((SCHEMAS / "kuberay.yaml").read_text())
    fields = _closed({**kubernetes, **kuberay})
    return jsonschema.Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": fields})


@cache
def _run_instances() -> Any:
    ec2 = botocore.session.get_session().get_service_model("ec2")
    return ec2.operation_model("RunInstances").input_shape


def _instance_problems(provider: str, node: dict[str, Any]) -> list[str]:
    """Return what a cloud finds wrong with a machine that is asked of it."""
    if provider == "aws":
        asked = {**node, "MinCount": 1, "MaxCount": 1}
        found = botocore.validate.ParamValidator().validate(asked, _run_instances())
        return [found.generate_report()] if found.has_errors() else []
    if provider == "gcp":
        return [error.message for error in _instance_schema().iter_errors(node)]
    return []


def ray_up_problems(config: dict[str, Any]) -> list[str]:
    """Return what ``ray up`` finds wrong with a file; unlike it, keys it does not know as well."""
    try:
        prepared = prepare_config(copy.deepcopy(config))
        validate_config(prepared)
    except _REFUSALS as error:
        return [repr(error)]
    problems = [error.message for error in _ray_up_schema().iter_errors(prepared)]
    for node_type in prepared["available_node_types"].values():
        problems += _instance_problems(config["provider"]["type"], node_type["node_config"])
    return problems


def manifest_problems(document: dict[str, Any]) -> list[str]:
    """Return what is wrong with a Kubernetes object: unknown or missing keys, and types."""
    kind = document.get("kind", "Service")
    return [error.message for error in _manifest_schema(kind).iter_errors(document)]


def misspelt(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each key of a file, as a path, with a copy of the file where it is misspelt."""
    for path in _keys(document, ()):
        changed = copy.deepcopy(document)
        parent: Any = changed
        for step in path[:-1]:
            parent = parent[step]
        parent[f"{path[-1]}z"] = parent.pop(path[-1])
        yield "/".join(map(str, path)), changed


def _keys(node: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    # a pod's "resources" have keys of Kubernetes, those of a node type a user's names
    names = path and path[-1] in _NAMES and "requests" not in node
    for key, value in enumerate(node) if isinstance(node, list) else node.items():
        if isinstance(node, dict) and not names:
            yield (*path, key)
        if isinstance(value, dict | list):
            yield from _keys(value, (*path, key))


@dataclass(frozen=True)
class Start:
    """A ``ray start``: its environment, and its options as Ray reads them."""

    environment: dict[str, str]
    options: dict[str, Any]


def starts(commands: list[str]) -> list[Start]:
    """Return every ``ray start`` among commands; an option that Ray does not know raises."""
    found = []
    for command in commands:
        before, _, options = command.partition("ray start ")
        if options:
            environment = dict(word.split("=", 1) for word in shlex.split(before) if "=" in word)
            found.append(Start(environment, start_options(shlex.split(options))))
    return found


def start_options(arguments: list[str]) -> dict[str, Any]:
    return start.make_context("ray start", arguments).params


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the pod templates of a Deployment, a RayCluster or a RayJob."""
    spec = document["spec"]
    if document["kind"] == "Deployment":
        return [spec["template"]]
    cluster = spec.get("rayClusterSpec", spec)
    return [cluster["headGroupSpec"]["template"]] + [
        group["template"] for group in cluster["workerGroupSpecs"]
    ]
