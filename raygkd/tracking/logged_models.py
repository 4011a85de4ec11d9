"""Models in MLflow's format.

Shapes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException

from raygkd.storage.atomic_files import local_copy
from raygkd.storage.object_store import RemotePath
from raygkd.storage.temporary import temporary_folder


@dataclass(frozen=True, kw_only=True)
class LoggedModel:
    """A registered model: its MLflow URI, registered name, version, and the version's alias."""

    uri: str
    name: str
    version: str
    alias: str


def log_model(
    client: MlflowClient,
    experiment_id: str,
    run_id: str,
    model: Any,
    example_BCHW: np.ndarray,
) -> Any:
    """Log a model through the client; return MLflow's record of it.

    A model that an earlier process of the run has logged is returned; one that it was logging when
    it was killed is marked as failed. ``mlflow.pytorch.log_model`` uses global state, prints, and
    loads the model as a check.
    """
    logged = _logged_before(client, experiment_id, run_id)
    if logged is None:
        logged = _log_model(client, experiment_id, run_id, model, example_BCHW)
    outputs = client.get_run(run_id).outputs
    known = {one.model_id for one in outputs.model_outputs} if outputs else set()
    if logged.model_id not in known:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return logged


def _logged_before(client: MlflowClient, experiment_id: str, run_id: str) -> Any:
    """Return the complete model of a run, or None."""
    complete = None
    for logged in client.search_logged_models(
        [experiment_id], filter_string=f"source_run_id = '{run_id}'"
    ):
        if logged.status == LoggedModelStatus.READY:
            complete = logged
        elif logged.status == LoggedModelStatus.PENDING:
            client.finalize_logged_model(logged.model_id, "FAILED")
    return complete


def _log_model(
    client: MlflowClient, experiment_id: str, run_id: str, model: Any, example_BCHW: np.ndarray
) -> Any:
    logged = client.create_logged_model(experiment_id, "student", source_run_id=run_id)
    try:
        with temporary_folder("model") as folder:
            path = folder / "model"
            _save_model(path, model, example_BCHW, logged)
            client.log_model_artifacts(logged.model_id, str(path))
    except BaseException:
        # report the first error
        with contextlib.suppress(MlflowException):
            client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    return logged


def _save_model(path: Path, model: Any, example_BCHW: np.ndarray, logged: Any) -> None:
    """Write the folder of the logged model in MLflow's format."""
    from mlflow.models import Model

    facts = Model(
        artifact_path=logged.artifact_location,
        run_id=logged.source_run_id,
        model_uuid=logged.model_id,
        model_id=logged.model_id,
    )
    if isinstance(model, Path | RemotePath):
        with local_copy(model) as file:
            _save_detector(path, file, example_BCHW, facts)
    else:
        _save_classifier(path, model, example_BCHW, facts)


def _save_classifier(path: Path, model: Any, example_BCHW: np.ndarray, facts: Any) -> None:
    import mlflow.pytorch
    import torch
    from mlflow.models import infer_signature

    # the export takes the number of images for free only where it sees more than one
    example_BCHW = np.resize(example_BCHW, (max(2, len(example_BCHW)), *example_BCHW.shape[1:]))
    with torch.no_grad():
        logits_BK = model.eval()(torch.from_numpy(example_BCHW)).numpy()
    mlflow.pytorch.save_model(
        model,
        path,
        mlflow_model=facts,
        input_example=example_BCHW,
        signature=infer_signature(example_BCHW, logits_BK),
        # torch.export's graph needs neither pickle nor raygkd where the model is loaded
        serialization_format="pt2",
        pip_requirements=[
            f"torch=={torch.__version__.split('+')[0]}",
            f"numpy=={np.__version__}",
        ],
    )


def _save_detector(path: Path, file: Path, example_BCHW: np.ndarray, facts: Any) -> None:
    import mlflow.pyfunc
    from mlflow.models import infer_signature

    from raygkd import deployed
    from raygkd.version import __version__

    detections_BD6 = deployed.Predictor(str(file)).predict(example_BCHW)
    # torchvision's detectors cannot be exported, since the number of their boxes is not known
    mlflow.pyfunc.save_model(
        path,
        loader_module=deployed.__name__,
        data_path=str(file),
        mlflow_model=facts,
        input_example=example_BCHW,
        signature=infer_signature(example_BCHW, detections_BD6),
        pip_requirements=[f"raygkd=={__version__}"],
    )
