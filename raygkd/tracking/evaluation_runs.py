"""Log evaluations as MLflow runs next to the run of the model."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raygkd.errors import TrackingError
from raygkd.tracking.redaction import short_reason, shown
from raygkd.tracking.store import existing_store
from raygkd.tracking.tags import EVALUATED_TAG


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The MLflow run that a model came from.

    Attributes:
        uri: of the store or server.
        run_id: of that run.
    """

    uri: str
    run_id: str


def record_evaluation(
    origin: Origin,
    *,
    name: str,
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    figures: Sequence[Path],
) -> str:
    """Log an evaluation as a run next to the one the model came from; return its id.

    The metrics are also logged to the logged model, if there is one.

    Args:
        origin: of the model.
        name: of the run, as the UI shows it.
        metrics: numbers; values that are not finite are skipped.
        tags: facts about it.
        figures: pictures.

    Raises:
        TrackingError: the store is missing, does not answer, or rejects the request.
    """
    from mlflow.entities import LoggedModelInput, Metric
    from mlflow.exceptions import MlflowException

    client = existing_store("MLflow", origin.uri)
    now = int(time.time() * 1000)
    try:
        source = client.get_run(origin.run_id)
        # a search logs the winner, and other runs log none
        logged = source.outputs.model_outputs if source.outputs else []
        model_id = logged[0].model_id if logged else None
        experiment = source.info.experiment_id
        told = {**tags, EVALUATED_TAG: origin.run_id}
        run_id = client.create_run(experiment, run_name=name, tags=told).info.run_id
        try:
            if model_id is not None:
                client.log_inputs(run_id, models=[LoggedModelInput(model_id)])
            entries = [
                Metric(metric, value, now, 0, model_id=model_id)
                for metric, value in metrics.items()
                if math.isfinite(value)
            ]
            client.log_batch(run_id, metrics=entries)
            for figure in figures:
                client.log_artifact(run_id, str(figure))
        except BaseException:
            # report the first error
            with contextlib.suppress(MlflowException, OSError):
                client.set_terminated(run_id, "FAILED")
            raise
        client.set_terminated(run_id)
    except Exception as error:
        raise TrackingError(
            f"MLflow at {shown(origin.uri)}: {short_reason(error, origin.uri)}"
        ) from error
    return run_id
