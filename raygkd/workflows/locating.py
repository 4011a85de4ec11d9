"""What is meant by MODEL: a file, a run's folder, or a model that MLflow has registered."""

from __future__ import annotations

from raygkd import tracking
from raygkd.errors import DataError
from raygkd.files import Place, place
from raygkd.workflows.single import MODEL

REGISTERED = "models:/"


def find_model(given: str, *, tracking_uri: str | None, output: str) -> Place:
    """Return the file of a model.

    Args:
        given: a file; the folder of a run; or ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``,
            whose run's folder must still be there.
        tracking_uri: of the MLflow store, for the last; None for the output folder's.
        output: folder of the runs.

    Raises:
        DataError: there is no such file.
        ConfigError: a URL that cannot be used.
        TrackingError: MLflow has no such model, or does not answer.
    """
    if given.startswith(REGISTERED):
        folder = place(tracking.run_folder(given, tracking.chosen_uri(tracking_uri, output)))
        file = folder / MODEL
        if not file.exists():
            raise DataError(f"MODEL {given}: its run's folder {folder} has no {MODEL} any more")
        return file
    path = place(given)
    if path.is_dir():
        if not (path / MODEL).exists():
            raise DataError(
                f"MODEL {given}: the folder has no {MODEL}: give the folder of a finished run, "
                "such as raygkd-output/runs/NAME, or the file of a model"
            )
        return path / MODEL
    if not path.exists():
        raise DataError(
            f"MODEL {given}: there is no such file: give one that 'raygkd tune', 'raygkd train' or "
            "'raygkd teacher' wrote, its run's folder, or models:/NAME@ALIAS"
        )
    return path
