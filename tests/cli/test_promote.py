"""``raygkd promote``: when the alias moves, and what is refused before anything is scored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from labelled import TEST, labelled_by
from lively import classifier_file
from mlflow import MlflowClient
from outcomes import Ran

from raygkd.models import ModelFile, save_model_file
from raygkd.tracking.store import connect, default_uri
from raygkd.tracking.tags import FOLDER_TAG, IMAGES_TAG
from raygkd.workflows.promote import is_better


@pytest.fixture
def client(tmp_path: Path, workplace: Path) -> MlflowClient:
    """A store of the test's own in its output folder; to make one takes seconds."""
    shutil.copy(workplace / "raygkd-output" / "mlflow.db", tmp_path)
    uri = default_uri(tmp_path)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture
def version(client: MlflowClient, tmp_path: Path) -> Callable[..., None]:
    """Return a function that registers a model file as the winner of a run."""
    experiment = connect(default_uri(tmp_path), "raygkd", tmp_path)
    client.create_registered_model("pets")

    def register(alias: str, model_file: ModelFile, images: str = "a") -> None:
        folder = tmp_path / alias
        folder.mkdir()
        save_model_file(folder / "model.pt", model_file)
        run = client.create_run(experiment, tags={FOLDER_TAG: str(folder)}).info.run_id
        made = client.create_model_version(
            "pets", "file:///nowhere", run_id=run, tags={IMAGES_TAG: images}
        )
        client.set_registered_model_alias("pets", alias, made.version)

    return register


@pytest.mark.parametrize("better", ["challenger", "champion"])
def test_the_alias_moves_to_the_better_one_alone(
    raygkd: Callable[..., Ran],
    client: MlflowClient,
    version: Callable[..., None],
    tmp_path: Path,
    better: str,
) -> None:
    models = {"champion": classifier_file("resnet8"), "challenger": classifier_file("resnet14")}
    for alias, model_file in models.items():
        version(alias, model_file, images=alias)
    data = labelled_by(models[better], tmp_path / "images.parquet")
    ran = raygkd("promote", "pets", "--data", data, "--output", tmp_path, "--json")
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    scores = {role: one["test_score"] for role, one in result["versions"].items()}
    assert scores.pop(better) == 1
    assert 0 <= scores.popitem()[1] < 1
    assert result["promoted"] == (better == "challenger")
    assert result["images"] == TEST
    assert not result["same_splits"]
    held = client.get_registered_model("pets").aliases
    moved, kept = {"champion": "2"}, {"champion": "1", "challenger": "2"}
    assert {alias: str(number) for alias, number in held.items()} == (
        moved if better == "challenger" else kept
    )
    told = client.get_model_version("pets", "2").tags["raygkd.promotion"]
    start = (
        "promoted: accuracy 1.0000 against " if result["promoted"] else "not promoted: accuracy "
    )
    assert told.startswith(start)


@pytest.mark.parametrize(
    ("ahead", "margin", "better"),
    [
        (0.0, 0.0, False),
        (0.01, 0.0, True),
        (-0.01, 0.0, False),
        (0.3 - 0.2, 0.1, True),
        (0.0999, 0.1, False),
    ],
)
def test_a_margin_must_be_reached(ahead: float, margin: float, better: bool) -> None:
    assert is_better(ahead, margin) is better


def test_what_cannot_be_compared(
    refused: Callable[..., str],
    client: MlflowClient,
    version: Callable[..., None],
    parquet: Callable[..., Path],
    tmp_path: Path,
) -> None:
    here = ("--output", tmp_path)
    assert "NAME nobody: Registered Model with name=nobody" in refused("promote", "nobody", *here)
    error = refused("promote", "models:/pets@champion", *here)
    assert "must be the name of a registered model, such as" in error
    assert "no version has the alias champion" in refused("promote", "pets", *here)
    version("champion", classifier_file())
    assert "has no challenger, version 1 is the champion" in refused("promote", "pets", *here)
    version("challenger", classifier_file("resnet14"))
    error = refused("promote", "pets", *here)
    assert "the model file does not record its data; pass --data" in error
    error = refused("promote", "pets", "--data", parquet(), *here)
    assert "it has 3 classes (cat, dog, eel), but the data has 3 classes (class-0" in error
    assert "there is no MLflow store" in refused("promote", "pets", "--output", tmp_path / "none")
