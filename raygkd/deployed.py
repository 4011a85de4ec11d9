"""The loader module of logged models: ``loader_module: raygkd.deployed``."""

from raygkd.deploy.mlflow_loader import Predictor, _load_pyfunc

__all__ = ["Predictor", "_load_pyfunc"]
