"""The facts that every MLflow run carries."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version

from raygkd.tracking.tags import FOLDER_TAG, IMAGES_TAG
from raygkd.version import __version__
from raygkd.workflows.session import Session


def run_tags(session: Session, role: str) -> dict[str, str]:
    """Return the facts that every MLflow run carries."""
    rows = session.images.rows
    tags = {
        "raygkd.role": role,
        "raygkd.dataset": session.config.data.dataset,
        IMAGES_TAG: session.images.identity,
        "raygkd.split": ", ".join(f"{name} {len(rows[name])}" for name in ("train", "val", "test")),
        FOLDER_TAG: str(session.folder),
        "python": platform.python_version(),
    }
    for one, weights in session.weights.items():
        tags |= {
            f"raygkd.{one}_weights.{name}": fact for name, fact in weights.to_mapping().items()
        }
    tags["version.raygkd"] = __version__
    for package in ("torch", "torchvision", "timm", "ray", "mlflow"):
        tags[f"version.{package}"] = version(package)
    commit = _git_commit()
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def _git_commit() -> str | None:
    """Return the commit of the folder that raygkd runs in, if it is one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10
        )
    except OSError:
        return None
    return done.stdout.strip() or None
