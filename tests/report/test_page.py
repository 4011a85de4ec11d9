"""``raygkd report`` on a real search, opened in a real browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Opened, is_installed, opened
from commands import commands_in
from PIL import Image

from raygkd.assembly.models import untrained_file
from raygkd.data.spec import ImageSpec
from raygkd.models import save_model_file
from raygkd.report.console import stderr_console
from raygkd.workflows.report import write_report

# what would be HTML, a formula, or two words elsewhere
CLASSES = ("$\\frac$ & co", "<script>throw 1")
pytestmark = [pytest.mark.e2e, pytest.mark.browser]
SIDE, IMAGES = 16, 60
TUNE = (
    *("tune", "--dataset", "imagefolder", "--image-size", SIDE, "--student", "resnet8"),
    *("--trials", 2, "--epochs", 2, "--batch-size", 16, "--max-concurrent", 2, "--json"),
    *("--beta", 1, "--gamma", 0.5),
)
SECTIONS = ["summary", "search", "sizes", "graphs", "attention", "losses", "examples", "left-out"]


def photos(folder: Path) -> Path:
    """Write images of classes that differ in brightness."""
    random = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(IMAGES):
            pixels = random.integers(100 * label, 100 * label + 120, (SIDE, SIDE, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a search with a teacher of random weights."""
    folder = tmp_path_factory.mktemp("searched")
    spec = ImageSpec(class_names=CLASSES, image_size=(SIDE, SIDE), mean=(0.4,) * 3, std=(0.3,) * 3)
    save_model_file(folder / "teacher.pt", untrained_file("resnet14", spec))
    given = ("--data-dir", photos(folder / "photos"), "--teacher", folder / "teacher.pt")
    with commands_in(tmp_path_factory.mktemp) as start:
        start(*TUNE, *given, "--output", folder / "output").result()
    return folder / "output"


@pytest.fixture(scope="module")
def report(output: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command printed."""
    with commands_in(tmp_path_factory.mktemp) as start:
        command = start("report", output, "--json")
        result = command.result()
        assert "report: 3/9 Accuracy, size and speed" in command.err
        assert "error" not in command.err
        assert "warning" not in command.err
    return result


@pytest.fixture(scope="module")
def seen(report: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """The page in a browser."""
    if not is_installed():
        pytest.skip("needs chromium and chromedriver")
    with opened(Path(report["html"]), tmp_path_factory.mktemp("profile")) as page:
        yield page


# the page in a browser


def test_every_picture_is_shown_and_nothing_is_complained_of(
    seen: Opened, report: dict[str, Any]
) -> None:
    widths = seen.run("return [...document.images].map(image => image.naturalWidth)")
    assert len(widths) == len(report["pictures"]) > 8
    assert min(widths) > 500
    assert seen.run("return [...document.images].every(image => image.alt)")
    assert seen.complaints == []


def test_the_page_asks_for_nothing_but_itself(seen: Opened) -> None:
    assert seen.requested == {seen.address}


def test_every_section_is_there_and_the_contents_lead_to_it(seen: Opened) -> None:
    assert seen.run("return [...document.querySelectorAll('section')].map(s => s.id)") == SECTIONS
    links = seen.run("return [...document.querySelectorAll('nav a')].map(a => a.hash)")
    assert links == [f"#{name}" for name in SECTIONS]
    assert seen.run("return [...document.querySelectorAll('h2')].every(h => h.innerText)")


def test_the_page_fits_a_phone(seen: Opened) -> None:
    seen.be_wide(400)
    assert seen.run("return window.innerWidth") == 400
    assert seen.run("return document.documentElement.scrollWidth") == 400
    outside = """return [...document.querySelectorAll('h1, h2, p, pre, nav, .scroll')]
        .filter(e => e.getBoundingClientRect().right > 400).length"""
    assert seen.run(outside) == 0


def test_names_are_shown_as_they_are_written_and_never_run(seen: Opened) -> None:
    text = seen.run("return document.body.innerText")
    for name in CLASSES:
        assert name in text
    assert seen.run("return document.scripts.length") == 0


# what the command prints and writes


def test_the_numbers_are_those_of_the_run(report: dict[str, Any]) -> None:
    run = Path(report["run"])
    result = json.loads((run / "result.json").read_text())
    models = report["numbers"]["summary"]["models"]
    assert list(models) == ["teacher", "student alone", "best student"]
    assert models["best student"]["test_score"] == result["best"]["test_score"]
    assert models["student alone"] == result["student_alone"]
    assert result["verdict"]["line"] in Path(report["html"]).read_text()
    trained = sum(trial["epochs"] for trial in result["trials"])
    assert report["numbers"]["search"]["epochs_trained"] == trained
    latency = report["numbers"]["sizes"]["latency_ms"]
    assert all(0 < of["median"] <= of["p95"] for of in latency.values())
    terms = report["numbers"]["losses"]["terms"]
    assert list(terms) == ["task", "vertex", "edge", "spectral"]
    assert all(len(values) == result["best"]["epochs"] for values in terms.values())
    examples = report["numbers"]["examples"]
    assert sum(count for name, count in examples.items() if name != "images") == examples["images"]


def test_page_and_pictures_lie_in_the_folder_of_the_run(report: dict[str, Any]) -> None:
    folder = Path(report["run"]) / "report"
    assert report["html"] == str(folder / "index.html")
    assert {*report["pictures"], report["html"]} == {str(path) for path in folder.iterdir()}
    for path in report["pictures"]:
        with Image.open(path) as picture:
            assert picture.format == "PNG"


def test_the_graphs_are_those_of_the_levels_that_the_best_trial_matched(
    report: dict[str, Any],
) -> None:
    best = json.loads((Path(report["run"]) / "result.json").read_text())["best"]
    levels = report["numbers"]["graphs"]["levels"]
    assert list(levels) == list(map(str, best["params"]["levels"]))
    for of in levels.values():
        assert of["before"] != of["after"]
        assert min(of["before"].values()) > 0
        assert min(of["after"].values()) > 0


def test_what_a_run_lacks_is_left_out(output: Path, report: dict[str, Any], tmp_path: Path) -> None:
    """A copy of the run without its checkpoints, as from another machine."""
    shutil.copytree(output, tmp_path / "copy")
    [run] = (tmp_path / "copy" / "runs").iterdir()
    shutil.rmtree(run / "trials")
    page = tmp_path / "pages" / "mine.html"
    told = write_report(str(run), str(page), console=stderr_console())
    assert list(told["numbers"]) == ["summary", "search", "sizes", "losses", "examples"]
    gone = "the checkpoint with the student's adapters no longer exists"
    assert f"Channel graphs: {gone}." in told["left_out"]
    assert f"Where the teacher looks: {gone}." in told["left_out"]
    names = {path.name for path in page.parent.iterdir()}
    assert {"mine.html", "mine-losses.png"} <= names
    assert all(name.startswith("mine") for name in names)
