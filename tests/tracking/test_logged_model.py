"""A model in MLflow is the model that was trained, for everyone who has the URI."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from servers import PATIENCE, Server, Serving

from raygkd.deploy.modules import DeployedClassifier
from raygkd.models import ModelFile, build_classifier
from raygkd.tracking.logged_models import LoggedModel
from raygkd.tracking.store import connect
from raygkd.tracking.tracker import Tracker

CLASSES, SIDE = 5, 16
NUMBERS = (1, 2, 5)
# loads the model where raygkd cannot be imported and pickle is not allowed
PROCESS = """
import os, sys
sys.modules["raygkd"] = None
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
import mlflow, numpy as np

uri, folder = sys.argv[1:]
mlflow.set_tracking_uri(uri)
mlflow.set_registry_uri(uri)
model = mlflow.pyfunc.load_model("models:/digits@champion")
for number in (1, 2, 5):
    np.save(f"{folder}/out{number}.npy", model.predict(np.load(f"{folder}/in{number}.npy")))
"""


@pytest.fixture(scope="module")
def classifier() -> DeployedClassifier:
    torch.manual_seed(0)
    model = build_classifier("resnet8", CLASSES)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.1, 0.1)
    return DeployedClassifier(
        ModelFile(
            name="resnet8",
            class_names=tuple("abcde"),
            image_size=(SIDE, SIDE),
            mean=(0.4, 0.5, 0.6),
            std=(0.2, 0.3, 0.4),
            state_dict=model.state_dict(),
            scores={},
            config="",
        )
    )


def images(number: int) -> np.ndarray:
    generator = np.random.default_rng(number)
    return generator.random((number, 3, SIDE, SIDE), dtype=np.float32)


def log(
    tracker: Tracker, classifier: torch.nn.Module, number: int = 2, key: str = "search"
) -> LoggedModel | None:
    tracker.start(key, key)
    return tracker.model(
        key,
        classifier,
        images(number),
        register_as="digits",
        description=f"| of {key} |",
        tags={"test_score": "0.5"},
    )


def test_another_process_gets_the_same_outputs_from_the_uri_alone(
    server: Server,
    classifier: DeployedClassifier,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    experiment = connect(server.uri, "models", tmp_path)
    tracker = Tracker(server.uri, experiment, tmp_path / "journal.jsonl")
    # one image: the number must be free all the same
    logged = log(tracker, classifier.train(), number=1)
    tracker.close()
    assert capfd.readouterr() == ("", "")
    for number in NUMBERS:
        np.save(tmp_path / f"in{number}.npy", images(number))
    subprocess.run(
        [sys.executable, "-c", PROCESS, server.uri, str(tmp_path)],
        check=True,
        timeout=PATIENCE,
        cwd=tmp_path,
    )
    for number in NUMBERS:
        with torch.no_grad():
            expected = classifier.eval()(torch.from_numpy(images(number))).numpy()
        np.testing.assert_allclose(np.load(tmp_path / f"out{number}.npy"), expected, atol=1e-5)

    client = MlflowClient(tracking_uri=server.uri, registry_uri=server.uri)
    run = client.get_run(tracker.run_id("search"))
    assert run.info.status == "FINISHED"
    (output,) = run.outputs.model_outputs
    assert logged == LoggedModel(
        uri=f"models:/{output.model_id}", name="digits", version="1", alias="champion"
    )
    stored = client.get_logged_model(output.model_id)
    assert (stored.status, stored.source_run_id) == ("READY", run.info.run_id)
    version = client.get_model_version_by_alias("digits", "champion")
    assert (version.run_id, version.source) == (run.info.run_id, stored.artifact_location)


def test_signature_example_and_alias_in_a_local_store(
    tracker: Tracker, classifier: DeployedClassifier, client: MlflowClient, uri: str
) -> None:
    from mlflow.models import Model

    first, second = log(tracker, classifier), log(tracker, classifier, key="second")
    assert first is not None
    assert second is not None
    assert (first.version, first.alias) == ("1", "champion")
    assert (second.version, second.alias) == ("2", "challenger")
    held = client.get_registered_model("digits").aliases
    assert {alias: str(version) for alias, version in held.items()} == {
        "champion": "1",
        "challenger": "2",
    }
    version = client.get_model_version("digits", "2")
    assert (version.description, version.tags["test_score"]) == ("| of second |", "0.5")
    assert version.run_id == tracker.run_id("second")
    assert client.get_run(tracker.run_id("search")).info.status == "RUNNING"
    logged = client.get_logged_model(second.uri.removeprefix("models:/"))
    folder = unquote(logged.artifact_location.removeprefix("file://"))
    saved = Model.load(folder)
    assert saved.signature is not None
    assert [spec.shape for spec in saved.signature.inputs] == [(-1, 3, SIDE, SIDE)]
    assert [spec.shape for spec in saved.signature.outputs] == [(-1, CLASSES)]
    assert saved.saved_input_example_info is not None
    example = saved.load_input_example(folder)
    np.testing.assert_allclose(example, images(2), atol=1e-6)


def test_the_champion_answers_over_http(
    server: Server, classifier: DeployedClassifier, tmp_path: Path
) -> None:
    """As docs/guides/deploying.md has it: `mlflow models serve`."""
    experiment = connect(server.uri, "served", tmp_path)
    tracker = Tracker(server.uri, experiment, tmp_path / "journal.jsonl")
    tracker.start("search", "search")
    logged = tracker.model(
        "search", classifier, images(2), register_as="served", description="", tags={}
    )
    tracker.close()
    assert logged is not None
    serving = Serving(tmp_path, f"models:/served@{logged.alias}", server.uri)
    serving.start()
    try:
        serving.wait()
        for number in NUMBERS:
            body = json.dumps({"inputs": images(number).tolist()}).encode()
            header = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{serving.uri}/invocations", body, header)
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                logits = np.array(json.load(answer)["predictions"], np.float32)
            with torch.no_grad():
                expected = classifier.eval()(torch.from_numpy(images(number))).numpy()
            np.testing.assert_allclose(logits, expected, atol=1e-4)
    finally:
        serving.kill()


def test_a_resumed_run_has_the_model_that_it_had(
    tracker: Tracker, classifier: DeployedClassifier, client: MlflowClient, uri: str, tmp_path: Path
) -> None:
    first = log(tracker, classifier)
    tracker.close("KILLED")
    versions = client.search_model_versions("name = 'digits'")
    resumed = Tracker(uri, tracker.experiment_id, tmp_path / "journal.jsonl")
    assert log(resumed, classifier) == first
    resumed.close()
    assert len(client.search_model_versions("name = 'digits'")) == len(versions)


def test_a_model_that_cannot_be_logged_is_a_warning(
    tracker: Tracker, client: MlflowClient, experiment: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Branching(torch.nn.Module):
        def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            flat = images_BCHW.flatten(1)
            return flat if flat.sum() > 0 else -flat

    assert log(tracker, Branching()) is None
    message = caplog.records[-1].getMessage()
    assert "did not receive the model of run 'search': " in message
    (logged,) = client.search_logged_models([experiment])
    assert logged.status == "FAILED"
