"""The ready-made clusters: what Ray, the clouds, KubeRay and Kubernetes take, and what is safe."""

from __future__ import annotations

import configparser
import re
import shlex
import subprocess
from pathlib import Path

import cluster_files as files
import pytest
from packaging.requirements import Requirement

import raygkd

RAY_UP = ["single-machine.yaml", "on-premise.yaml", "aws.yaml", "gcp.yaml"]
KUBERNETES = ["kuberay-cluster.yaml", "kuberay-job.yaml", "mlflow.yaml"]
OBJECTS = [
    pytest.param(document, id=f"{name}:{document['kind']}")
    for name in KUBERNETES
    for document in files.documents(name)
]
WITH_PODS = [
    document
    for name in KUBERNETES
    for document in files.documents(name)
    if document["kind"] in ("Deployment", "RayCluster", "RayJob")
]
RAY = {document["kind"]: document["spec"] for document in WITH_PODS}


def ray_up(name: str) -> dict:
    [config] = files.documents(name)
    return config


def pinned() -> dict[str, Requirement]:
    lines = files.text("requirements.txt").splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    return {requirement.name.lower(): requirement for requirement in requirements}


def version(name: str) -> str:
    [specifier] = pinned()[name].specifier
    assert specifier.operator == "=="
    return specifier.version


def test_every_cluster_file_is_checked_here() -> None:
    names = sorted(path.name for path in files.FOLDER.iterdir())
    assert names == sorted([*RAY_UP, *KUBERNETES, "Containerfile", "requirements.txt"])


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_and_the_cloud_take_the_file(name: str) -> None:
    assert files.ray_up_problems(ray_up(name)) == []


@pytest.mark.parametrize("document", OBJECTS)
def test_kuberay_and_kubernetes_take_the_object(document: dict) -> None:
    assert files.manifest_problems(document) == []


@pytest.mark.parametrize("name", RAY_UP)
def test_a_misspelt_key_of_a_ray_up_file_is_refused(name: str) -> None:
    taken = [key for key, copy in files.misspelt(ray_up(name)) if not files.ray_up_problems(copy)]
    assert taken == []


@pytest.mark.parametrize("document", OBJECTS)
def test_a_misspelt_key_of_an_object_is_refused(document: dict) -> None:
    copies = files.misspelt(document)
    assert [key for key, copy in copies if not files.manifest_problems(copy)] == []


@pytest.mark.parametrize("name", RAY_UP)
def test_every_node_starts_with_the_token_and_the_dashboard_on_loopback(name: str) -> None:
    config = ray_up(name)
    heads = files.starts(config["head_start_ray_commands"])
    workers = files.starts(config.get("worker_start_ray_commands", []))
    assert [start.options["head"] for start in heads + workers] == [True] + [False] * len(workers)
    assert [start.options["dashboard_host"] for start in heads] == ["127.0.0.1"]
    assert {start.environment["RAY_AUTH_MODE"] for start in heads + workers} == {"token"}
    assert len(workers) == (0 if name == "single-machine.yaml" else 1)


def test_machines_that_are_there_are_started_by_the_autoscaler_that_starts_all() -> None:
    [head] = files.starts(ray_up("on-premise.yaml")["head_start_ray_commands"])
    assert head.environment["RAY_enable_autoscaler_v2"] == "0"


@pytest.mark.parametrize("name", ["single-machine.yaml", "on-premise.yaml"])
def test_every_shell_finds_the_python_and_the_ray_that_were_set_up(
    name: str, tmp_path: Path
) -> None:
    in_profile = ray_up(name)["setup_commands"][-1]
    (tmp_path / ".bashrc").touch()
    for _ in range(2):  # as often as "ray up" is
        subprocess.run(["bash", "-c", in_profile], check=True, env={"HOME": str(tmp_path)})
    shell = subprocess.run(
        ["bash", "-c", "source ~/.bashrc; echo $PATH"],
        check=True,
        capture_output=True,
        text=True,
        env={"HOME": str(tmp_path), "PATH": "/bin"},
    )
    assert shell.stdout == f"{tmp_path}/raygkd-venv/bin:/bin\n"


@pytest.mark.parametrize("name", RAY_UP)
def test_the_token_reaches_every_node_as_a_file(name: str) -> None:
    assert ray_up(name)["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_TOKEN" not in files.text(name)


@pytest.mark.parametrize(
    ("name", "spot"),
    [
        ("aws.yaml", lambda node: node.get("InstanceMarketOptions") == {"MarketType": "spot"}),
        (
            "gcp.yaml",
            lambda node: node.get("scheduling", {}).get("provisioningModel") == "SPOT",
        ),
    ],
)
def test_workers_are_spot_instances_and_the_head_is_none(name: str, spot) -> None:
    config = ray_up(name)
    types = config["available_node_types"]
    assert {kind: spot(types[kind]["node_config"]) for kind in types} == {
        "head": False,
        "worker": True,
    }
    assert config["head_node_type"] == "head"


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_a_kuberay_cluster_has_a_token_and_the_ray_of_the_image(kind: str) -> None:
    cluster = RAY[kind].get("rayClusterSpec", RAY[kind])
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == version("ray")
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        files.start_options([f"--{key}={value}" for key, value in group["rayStartParams"].items()])


def test_a_job_is_tried_again_by_a_command_that_goes_on() -> None:
    assert RAY["RayJob"]["backoffLimit"] > 0
    program, command, *arguments = shlex.split(RAY["RayJob"]["entrypoint"])
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert (program, command) == ("raygkd", "tune")
    assert options["--name"]
    assert options["--output"].startswith("s3://")


@pytest.mark.parametrize("document", WITH_PODS, ids=lambda document: document["kind"])
def test_what_a_pod_names_is_there(document: dict) -> None:
    all_text = "".join(files.text(name) for name in KUBERNETES)
    secrets = set(re.findall(r"kubectl create secret generic (\S+)", all_text))
    claims = {
        found["metadata"]["name"]
        for name in KUBERNETES
        for found in files.documents(name)
        if found["kind"] == "PersistentVolumeClaim"
    }
    for pod in files.pods(document):
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        for volume in volumes.values():
            assert volume["persistentVolumeClaim"]["claimName"] in claims
        for container in pod["spec"]["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= set(volumes)
            for variable in container["env"]:
                reference = variable["valueFrom"]["secretKeyRef"]
                assert reference["name"] in secrets
                assert f"#     {reference['key']}=" in all_text
            for source in container.get("envFrom", []):
                assert source["secretRef"]["name"] in secrets


def test_the_mlflow_service_finds_a_server_that_asks_for_a_password() -> None:
    from mlflow.cli import server

    objects = {document["kind"]: document for document in files.documents("mlflow.yaml")}
    service, deployment = objects["Service"], objects["Deployment"]["spec"]
    [container] = deployment["template"]["spec"]["containers"]
    labels = deployment["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == deployment["selector"]["matchLabels"] == labels
    [port] = service["spec"]["ports"]
    assert container["ports"] == [{"name": port["targetPort"], "containerPort": port["port"]}]

    assert container["command"][:2] == ["mlflow", "server"]
    options = server.make_context("mlflow server", container["command"][2:]).params
    assert options["app_name"] == "basic-auth"
    assert options["port"] == port["port"]
    host = f"{service['metadata']['name']}:{port['port']}"
    assert host in options["allowed_hosts"].split(",")
    assert f"http://{host}" in RAY["RayJob"]["entrypoint"]


def test_there_is_one_image_and_it_is_of_this_version() -> None:
    image = f"registry.example.com/raygkd:{raygkd.__version__}"
    containers = [
        container
        for document in WITH_PODS
        for pod in files.pods(document)
        for container in pod["spec"]["containers"]
    ]
    used = {container["image"] for container in containers}
    used |= {ray_up(name)["docker"]["image"] for name in ("aws.yaml", "gcp.yaml")}
    assert used == {image}
    assert f"--tag {image} ." in files.text("Containerfile")


def test_pinned_versions_are_ones_that_raygkd_allows() -> None:
    setup = configparser.ConfigParser()
    setup.read(files.FOLDER.parent / "setup.cfg")
    for line in setup["options"]["install_requires"].split():
        needed = Requirement(line)
        assert needed.specifier.contains(version(needed.name.lower())), needed
        assert needed.extras <= pinned()[needed.name.lower()].extras, needed


def test_the_image_is_built_from_the_checkout_with_pinned_versions_for_no_root() -> None:
    steps = files.text("Containerfile").replace("\\\n", " ").splitlines()
    [base] = [step for step in steps if step.startswith("FROM ")]
    assert re.fullmatch(r"FROM python:3\.11\.\d+-slim-\w+", base)
    copied = [path for step in steps if step.startswith("COPY ") for path in step.split()[1:-1]]
    assert "cluster/requirements.txt" in copied
    assert [path for path in copied if not (files.FOLDER.parent / path).exists()] == []
    installs = [step for step in steps if "pip install" in step]
    assert len(installs) == 2
    assert "--requirement /opt/raygkd/cluster/requirements.txt" in installs[0]
    assert "--no-deps /opt/raygkd" in installs[1]
    [user] = [int(step.split()[1]) for step in steps if step.startswith("USER ")]
    assert user > 0
    for document in WITH_PODS:
        for pod in files.pods(document):
            security = pod["spec"]["securityContext"]
            assert security == {"runAsNonRoot": True, "runAsUser": user, "fsGroup": user}
