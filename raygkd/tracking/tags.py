"""Names of the tags that raygkd reads and writes in MLflow."""

from __future__ import annotations

PARENT_TAG = "mlflow.parentRunId"
# what the UI shows above a run, as Markdown
DESCRIPTION_TAG = "mlflow.note.content"
# finds the run that a start has made although its answer was lost
START_TAG = "raygkd.start"
# of a run: where its files are
FOLDER_TAG = "raygkd.folder"
# of an evaluation: the run that the model came from
EVALUATED_TAG = "raygkd.evaluated_run"
# of a version: its model file in the run's folder, where that is not model.pt
FILE_TAG = "raygkd.file"
# of a run and of a version: digits that stand for its images and splits
IMAGES_TAG = "raygkd.images"
