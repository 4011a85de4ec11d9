"""MLflow: runs, curves and models. The only package that imports mlflow."""

import os

# read when mlflow is imported. A server that is down must be noticed in seconds, and a request that
# MLflow repeats on its own could make a run twice: the tracker tries again by itself, and looks
# first
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# MLflow prints the URL of each run that ends, with the password that is in it
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
