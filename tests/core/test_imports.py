"""What may import what, and what stays unloaded until it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import raygkd

PACKAGE = Path(raygkd.__file__).parent
CORE = (
    *("graph", "losses", "models", "data", "metrics", "detection_metrics", "calibration"),
    *("latency", "engine"),
)
SETTINGS = (
    *("errors", "files", "remote", "journal", "registry", "config", "resuming", "space", "build"),
    *("variants", "deployed", "extras", "inference", "exporting", "agreement"),
    *("output_meter", "distilling"),
)
UPPER = (
    *("rayrun", "tracking", "report", "workflows", "inputs", "ui", "doctor", "bench"),
    *("options", "job_commands", "model_commands", "cli"),
)
HEAVY = (
    *("ray", "mlflow", "click", "rich", "pyarrow", "sklearn", "matplotlib", "yaml"),
    *("faster_coco_eval", "fsspec"),
    *("onnx", "onnxscript", "onnxruntime", "safetensors"),
)


def imports(path: Path) -> Iterator[str]:
    """Yield the full name of everything a file imports, wherever in it the statement stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def files(*parts: str) -> list[Path]:
    """Return the files of modules and packages inside raygkd."""
    found = []
    for part in parts:
        module = PACKAGE / f"{part}.py"
        found += [module] if module.exists() else sorted((PACKAGE / part).rglob("*.py"))
        assert found, part
    return found


def importers(package: str) -> set[str]:
    """Return the files of raygkd that import a package, relative to it."""
    return {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == package for name in imports(path))
    }


def crossings(paths: list[Path], forbidden: tuple[str, ...]) -> set[tuple[str, str]]:
    """Return the pairs of a file and what it imports of the forbidden parts of raygkd."""
    return {
        (str(path.relative_to(PACKAGE)), name)
        for path in paths
        for name in imports(path)
        if name.startswith("raygkd.") and name.split(".")[1] in forbidden
    }


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_rayrun_alone_imports_ray():
    found = importers("ray")
    assert found
    assert {name for name in found if not name.startswith("rayrun/")} == set()


def test_tracking_alone_imports_mlflow():
    assert importers("mlflow") == {"tracking.py"}


def test_nothing_imports_torchdistill():
    """The tests alone do, to hold our losses to its."""
    assert importers("torchdistill") == set()


def test_core_imports_nothing_that_stands_above_it():
    assert crossings(files(*CORE, *SETTINGS), UPPER) == set()


def test_tensors_know_nothing_of_settings_and_training():
    lower = files("graph", "losses", "models", "data", "metrics", "detection_metrics")
    assert crossings(lower, ("engine", "config", "space", "build")) == set()


def test_every_module_is_placed():
    """A new module belongs to one of the layers above, so that the checks hold for it too."""
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert modules - {"__init__", "__main__", "__pycache__"} == {*CORE, *SETTINGS, *UPPER}


def test_core_works_without_the_other_packages():
    modules = ", ".join(f"raygkd.{name}" for name in (*CORE, *SETTINGS))
    code = f"import sys; sys.modules.update(dict.fromkeys({HEAVY})); import {modules}"
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


def test_the_core_is_measured_without_the_other_packages():
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({HEAVY})); "
        "sys.argv = ['bench', 'core', '--help']; import raygkd.bench.__main__ as b; b.main()"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert "--quick" in result.stdout
