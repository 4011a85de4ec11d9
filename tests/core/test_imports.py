"""What may import what, what stays unloaded until it is needed, and how large modules are."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from PIL import Image

import raygkd
from raygkd.assembly.models import untrained_file
from raygkd.data.spec import ImageSpec
from raygkd.models import save_model_file

PACKAGE = Path(raygkd.__file__).parent
# from the lowest; a module imports what is below it, and of its own layer its own package alone.
# The longest name counts: raygkd.data.run_images stands above the rest of raygkd.data
LAYERS = (
    ("errors", "version"),
    ("registry", "optional_packages", "storage"),
    ("graph", "data"),
    ("accelerated",),
    ("losses", "models"),
    ("config", "metrics"),
    ("engine",),
    ("assembly", "deploy", "data.run_images"),
    ("api", "deployed"),
    ("rayrun", "tracking"),
    ("report",),
    ("workflows",),
    ("bench",),
    ("cli",),
    ("commands",),
)
# what needs torch, torchvision and the standard library only
CORE = ("graph", "accelerated", "losses", "models", "metrics", "engine")
SETTINGS = ("errors", "registry", "optional_packages", "storage", "config", "assembly", "deploy")
ALSO_LIGHT = ("data", "api", "deployed", "workflows.resume", "workflows.ablation")
HEAVY = (
    *("ray", "mlflow", "click", "rich", "pyarrow", "sklearn", "matplotlib", "yaml"),
    *("faster_coco_eval", "fsspec"),
    *("onnx", "onnxscript", "onnxruntime", "safetensors"),
    *("timm", "transformers", "huggingface_hub"),
)
# names that more than one package has a module of
KNOWN_NAMESAKES = {"levels", "spectral"}
MOST_AT_ROOT, MOST_LINES = 12, 500
REASON = f"Longer than {MOST_LINES} lines because"


def modules() -> dict[str, Path]:
    """Return the full name of every module -> its file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """Yield the full name of everything a file imports, wherever in it the statement stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def imported_modules() -> dict[str, set[str]]:
    """Return module -> modules of raygkd that it imports, also for types alone."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        named = {
            name if name in known else name.rpartition(".")[0]
            for name in imports(path)
            if name.split(".")[0] == "raygkd"
        }
        assert named <= known.keys(), f"{path} imports {named - known.keys()}"
        graph[module] = named - {module}
    return graph


def reached(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """Return the modules that a module imports, and those that they import, and so on."""
    found: set[str] = set()
    ahead = list(graph[start])
    while ahead:
        module = ahead.pop()
        if module not in found:
            found.add(module)
            ahead += graph[module]
    return found


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Return the largest groups of modules that all import each other."""
    reach = {module: reached(graph, module) for module in graph}
    found: list[set[str]] = []
    for module in sorted(graph):
        group = {other for other in reach[module] if module in reach[other]}
        if group and group not in found:
            found.append(group)
    return found


def layer(module: str) -> tuple[int, str] | None:
    """Return the height of a module and its package; None of the root and ``__main__``."""
    name = module.removeprefix("raygkd").removeprefix(".")
    while name:
        for height, names in enumerate(LAYERS):
            if name in names:
                return height, name.split(".")[0]
        name = name.rpartition(".")[0]
    return None


def upward(graph: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    """Return the imports that do not point down, nor to the module's own package."""
    found = set()
    for module, targets in graph.items():
        for target in targets:
            here, there = layer(module), layer(target)
            if here and there and there != here and there[0] >= here[0]:
                found.add((module, target))
    return found


def importers(package: str) -> set[str]:
    """Return the files of raygkd that import a package, relative to it."""
    return {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == package for name in imports(path))
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
    found = importers("mlflow")
    assert found
    assert {name for name in found if not name.startswith("tracking/")} == set()


def test_what_is_fast_is_chosen_in_one_place():
    """The benchmark of the spectral embedding measures it alone."""
    found = {
        module
        for module, targets in imported_modules().items()
        if any(target.startswith("raygkd.accelerated") for target in targets)
    }
    outside = {module for module in found if not module.startswith("raygkd.accelerated")}
    assert outside == {"raygkd.losses.graph", "raygkd.bench.spectral_rows"}


def test_only_the_comparison_with_it_imports_torchdistill():
    """The tests do, too, to hold our losses to its."""
    assert importers("torchdistill") == {"bench/peer_steps.py"}


def test_imports_have_no_circle():
    assert circles(imported_modules()) == []


def test_imports_point_down():
    assert upward(imported_modules()) == set()


def test_every_module_has_a_layer():
    root = {"raygkd", "raygkd.__main__"}
    assert {module for module in modules() if layer(module) is None} == root


def test_the_root_is_small():
    files = [path for path in PACKAGE.iterdir() if path.is_file()]
    assert len(files) <= MOST_AT_ROOT, sorted(path.name for path in files)


def test_long_modules_say_why():
    for path in modules().values():
        text = path.read_text()
        if len(text.splitlines()) > MOST_LINES:
            assert REASON in (ast.get_docstring(ast.parse(text)) or ""), path


def test_no_two_modules_have_one_name():
    names = Counter(path.stem for path in modules().values())
    several = {name for name, count in names.items() if count > 1}
    assert several - {"__init__", "__main__"} <= KNOWN_NAMESAKES


def test_core_works_without_the_other_packages():
    light = [
        module
        for module in modules()
        if module.removeprefix("raygkd.").split(".")[0] in (*CORE, *SETTINGS)
    ]
    names = ", ".join([*light, *(f"raygkd.{name}" for name in ALSO_LIGHT)])
    code = f"import sys; sys.modules.update(dict.fromkeys({HEAVY})); import {names}"
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


def test_help_loads_nothing_heavy():
    heavy = ("torch", "numpy", *(name for name in HEAVY if name != "click"))
    code = (
        f"import sys; import raygkd.cli.main as m; print([n for n in {heavy} if n in sys.modules])"
    )
    result = run_python("-c", code)
    assert (result.stdout, result.returncode) == ("[]\n", 0), result.stderr


def loaded_by(*arguments: str | Path) -> tuple[int, set[str]]:
    """Return the exit code of a command, and the packages that it has loaded."""
    code = (
        "import sys; from raygkd.cli.main import run; code = run(); "
        "print('loaded', code, *{name.partition('.')[0] for name in sys.modules})"
    )
    ran = run_python("-c", code, *map(str, arguments))
    _, code, *packages = ran.stdout.splitlines()[-1].split()
    assert _ == "loaded", ran.stderr
    return int(code), set(packages)


def test_a_training_by_one_process_does_not_load_ray(tmp_path: Path) -> None:
    options = ("--limit-train", "64", "--batch-size", "32", "--epochs", "1", "--output", tmp_path)
    code, packages = loaded_by("teacher", "--teacher", "resnet8", *options)
    assert code == 0
    assert "torch" in packages
    assert packages.isdisjoint(("ray", "timm", "sklearn", "matplotlib"))


def test_a_prediction_for_few_images_loads_neither_ray_nor_mlflow(tmp_path: Path) -> None:
    side = 8
    spec = ImageSpec(class_names=("a", "b"), image_size=(side, side), mean=(0.5,) * 3, std=(1,) * 3)
    save_model_file(tmp_path / "model.pt", untrained_file("resnet8", spec))
    Image.new("RGB", (side, side)).save(tmp_path / "one.png")
    code, packages = loaded_by("predict", tmp_path / "model.pt", tmp_path / "one.png")
    assert code == 0
    assert "torch" in packages
    assert packages.isdisjoint(("ray", "mlflow", "timm", "sklearn", "matplotlib"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--studnt", "resnet8"),
        ("train", "--alpha", "-1"),
        ("train", "--method", "kdd"),
        ("train", "--dataset", "digts"),
        ("train", "--config", "missing.yaml"),
        ("train", "--set", "dkd.bta=1"),
        ("train", "--resume", "missing"),
        ("train", "--workers", "3", "--batch-size", "64"),
        ("tune", "--space", "missing.yaml"),
        ("train", "--tracking-uri", "file:///tmp"),
        ("predict", "missing.pt", "."),
    ],
)
def test_a_mistake_is_told_before_anything_heavy_is_loaded(arguments: tuple[str, ...]) -> None:
    code, packages = loaded_by(*arguments)
    assert code == 2
    assert packages.isdisjoint(("torch", "ray", "mlflow", "pandas", "matplotlib"))


@pytest.mark.parametrize("option", ["--student", "--students", "--teacher"])
def test_a_wrong_model_is_told_before_ray_and_mlflow_are_loaded(option: str) -> None:
    code, packages = loaded_by("tune", option, "resnet9x")
    assert code == 2
    assert packages.isdisjoint(("ray", "mlflow", "pandas", "matplotlib"))
