"""``raygkd doctor`` finds what is wrong, and says what to do; nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raygkd.tracking.store import connect, probe
from raygkd.workflows import doctor

REPOSITORY = Path(__file__).parents[2]
NOBODY = "127.0.0.1:1"


def examined(
    output: Path, tracking_uri: str | None = None, address: str | None = NOBODY
) -> dict[str, dict[str, str]]:
    result = doctor.examine(
        output=str(output),
        tracking_uri=tracking_uri,
        address=address,
        advance=lambda *_: None,
    )
    assert result["ok"] == all(one["status"] != "fix" for one in result["checks"])
    return {one["check"]: one for one in result["checks"]}


@pytest.fixture
def taken_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A port that something listens on, in the place of the UI's."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(doctor, "PORTS", {port: "choose another port"})
        yield port


def test_what_is_well_and_what_is_not(tmp_path: Path, taken_port: int) -> None:
    found = examined(tmp_path / "new", tracking_uri="http://127.0.0.1:1")
    for name in ("Python", "torch", "output folder"):
        assert found[name]["status"] == "ok", found[name]
    assert "operators run" in found["torch"]["found"]
    assert found["output folder"]["found"] == f"{tmp_path}/new, created by the first run"
    assert found[f"port {taken_port}"]["status"] == "note"
    assert found["MLflow"]["status"] == "fix"
    assert found["MLflow"]["found"] == "http://127.0.0.1:1 cannot be used: no answer"
    assert found["Ray"]["status"] == "fix"
    assert f"no Ray cluster at {NOBODY}" in found["Ray"]["found"]
    assert found["Ray"]["advice"].startswith("start one with 'ray start --head'")
    assert list(tmp_path.iterdir()) == []


def test_stores(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert probe(uri) is None
    connect(uri, "raygkd", tmp_path)
    assert probe(uri) == f"{uri}, 2 experiments"
    assert examined(tmp_path)["MLflow"]["found"] == f"{uri}, 2 experiments"
    # in other folders, because MLflow remembers the stores that it has opened
    old, other = tmp_path / "old", tmp_path / "other"
    for folder in (old, other):
        folder.mkdir()
    shutil.copy(tmp_path / "mlflow.db", old)
    with contextlib.closing(sqlite3.connect(old / "mlflow.db")) as store:
        store.execute("UPDATE alembic_version SET version_num = 'of another time'")
        store.commit()
    found = examined(old)["MLflow"]
    assert found["status"] == "fix"
    assert "out-of-date" in found["found"]
    (other / "mlflow.db").write_text("no database at all")
    assert "file is not a database" in examined(other)["MLflow"]["found"]


def test_packages_of_other_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation that asks for what is not there: its metadata are found first."""
    info = tmp_path / "raygkd-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: raygkd\nVersion: 9\nRequires-Python: >=3.99\n"
        "Requires-Dist: torch>=999\nRequires-Dist: numpy>=1\nRequires-Dist: nobody-has-this>=1\n"
        'Requires-Dist: nor-this; extra == "export"\nRequires-Dist: nor-that; extra == "export"\n'
        'Requires-Dist: elsewhere; sys_platform == "win32"\n'
        'Requires-Dist: of-tests; extra == "test"\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    findings = {one.check: one for one in doctor._versions()}
    assert {name: one.status for name, one in findings.items()} == {
        "Python": "fix",
        "torch": "fix",
        "nobody-has-this": "fix",
        "extra export": "note",
    }
    assert findings["torch"].advice == "pip install 'torch>=999'"
    assert findings["nobody-has-this"].found == "not installed"
    assert findings["extra export"].found == "nor-this, nor-that: not installed"


def test_disks_and_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(doctor, "DISK_LEAST", 1 << 40)
    [of_runs, of_ray] = doctor._disks(str(tmp_path / "new"))
    assert (of_runs.status, of_ray.status) == ("fix", "fix")
    assert of_runs.found.startswith(f"{tmp_path}: ")
    assert of_ray.advice == "free some space, or choose another RAY_TMPDIR"
    monkeypatch.setattr(doctor, "STORE_ENOUGH", 1 << 40)
    monkeypatch.setattr(doctor, "STORE_SHARE", 1e6)
    [memory] = doctor._shared_memory()
    assert memory.status == "note"
    assert "--shm-size" in memory.advice


def test_command(tmp_path: Path) -> None:
    """From the outside, with a cluster of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "raygkd", "doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(REPOSITORY)},
    )
    result: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if result["ok"] else 1)
    checks = {one["check"]: one for one in result["checks"]}
    assert checks["Ray"]["status"] == "ok", checks["Ray"]
    assert checks["Ray"]["found"].startswith("started here: 1 node(s), ")
    assert list(tmp_path.iterdir()) == []
