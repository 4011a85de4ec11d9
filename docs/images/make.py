"""Make the pictures of these pages again, all or some: ``python docs/images/make.py [NAME ...]``.

Each is made by real commands on built-in data, in the folder ``--work``; runs that are there are
not repeated. ``report`` and ``mlflow`` need Chromium and its driver (``pip install '.[test]'`` and
``apt-get install chromium chromium-driver``). All of them take about half an hour on two CPU
cores. ``overview.svg`` is drawn by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import runpy
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image
from record import record

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RAYGKD = (sys.executable, "-m", "raygkd")
PORT = 5973
SEARCH = (
    "tune --dataset parquet --data-dir shards --teacher resnet20 --teacher-epochs 5 "
    "--student resnet8 --trials 4 --epochs 5 --name first"
)
FRONT = (
    "tune --dataset digits --students resnet8,resnet14,resnet20 --methods graph,logit-std "
    "--objective score,latency --max-params 200000 --trials 8"
)
DETECTION = "teacher --dataset digits-voc --epochs 5 --name scenes"


def results(work: Path) -> None:
    """Plot the results that are kept with the benchmarks."""
    runpy.run_path(str(ROOT / "tests" / "benchmarks" / "plot_results.py"), run_name="__main__")


def search(work: Path) -> None:
    """Record the search of the quickstart in a terminal."""
    folder = empty(work / "search")
    raygkd(folder, "data", "prepare", "--dataset", "digits", "--output", "shards")
    record(["raygkd", *SEARCH.split()], folder, HERE / "search.svg")


def front(work: Path) -> None:
    """Take the front of score and latency from the files of a search."""
    run = finished(work / "front", FRONT)
    shrunk(Image.open(run / "front.png"), HERE / "front.png")


def detections(work: Path) -> None:
    """Draw what a detector finds in four scenes of the test split."""
    run = finished(work / "detection", DETECTION)
    shards, scenes, drawn = (empty(work / name) for name in ("shards", "scenes", "drawn"))
    raygkd(work, "data", "prepare", "--dataset", "digits-voc", "--output", str(shards))
    rows = [row for row in pq.read_table(shards).to_pylist() if row["split"] == "test"]
    for number, row in enumerate(rows[:4]):
        (scenes / f"{number}.png").write_bytes(row["image"])
    raygkd(
        work,
        "predict",
        str(run / "model.pt"),
        str(scenes),
        "--out",
        "found.jsonl",
        "--draw",
        str(drawn),
    )
    beside([Image.open(path) for path in sorted(drawn.glob("*.png"))], HERE / "detections.png")


def report(work: Path) -> None:
    """Photograph the channel graphs in the report on the search."""
    run = searched(work)
    raygkd(work, "report", str(run))
    page = run / "report" / "index.html"
    with browser(800, 2800) as driver:
        driver.get(page.as_uri())
        driver.find_element("id", "graphs").screenshot(str(work / "report.png"))
    shrunk(Image.open(work / "report.png"), HERE / "report.png")


def mlflow(work: Path) -> None:
    """Photograph the search in MLflow: its run, with the description that ranks the trials."""
    run = searched(work)
    output = run.parents[1]
    places = json.loads((run / "result.json").read_text())["mlflow"]
    path = f"#/experiments/{places['experiment_id']}/runs/{places['parent_run_id']}"
    server = subprocess.Popen([*RAYGKD, "ui", "--output", str(output), "--port", str(PORT)])
    try:
        with browser(1000, 1500) as driver:
            wait_for(f"http://127.0.0.1:{PORT}/health")
            driver.get(f"http://127.0.0.1:{PORT}/{path}?workflowType=machine_learning")
            driver.implicitly_wait(60)
            for name in ("Close", "Expand description"):
                driver.find_element("css selector", f"button[aria-label='{name}']").click()
            title = driver.find_element("xpath", "//h4[text()='Description']")
            end = title.find_element("xpath", "..")
            time.sleep(2)
            driver.save_screenshot(str(work / "mlflow.png"))
            left, bottom = end.rect["x"] - 16, end.rect["y"] + end.rect["height"]
    finally:
        server.terminate()
        server.wait()
    page = Image.open(work / "mlflow.png")
    shrunk(page.crop((left, 12, page.width - 16, bottom)), HERE / "mlflow.png")


PICTURES = {one.__name__: one for one in (results, search, front, detections, report, mlflow)}


def raygkd(folder: Path, *arguments: str) -> None:
    """Run a command in a folder."""
    print("$ raygkd", *arguments, flush=True)
    subprocess.run([*RAYGKD, *arguments], cwd=folder, check=True)


def searched(work: Path) -> Path:
    """Return the folder of the recorded search, which is made if there is none."""
    if not list(work.glob("search/raygkd-output/runs/*/result.json")):
        search(work)
    [result] = work.glob("search/raygkd-output/runs/*/result.json")
    return result.parent


def wait_for(url: str) -> None:
    """Wait until a server answers, at most two minutes."""
    for _ in range(120):
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(1)
    raise TimeoutError(f"{url} does not answer")


def finished(folder: Path, command: str) -> Path:
    """Return the folder of a run, which is made if there is none."""
    if not list(folder.glob("raygkd-output/runs/*/result.json")):
        raygkd(empty(folder), *command.split())
    [result] = folder.glob("raygkd-output/runs/*/result.json")
    return result.parent


def empty(folder: Path) -> Path:
    """Return a folder with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@contextlib.contextmanager
def browser(width: int, height: int) -> Iterator[Any]:
    """Yield a browser without a window."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(flag)
    options.add_argument(f"--window-size={width},{height}")
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def beside(images: list[Image.Image], path: Path) -> None:
    """Write pictures side by side, with a gap between them."""
    gap, height = 8, max(image.height for image in images)
    width = sum(image.width + gap for image in images) - gap
    sheet, left = Image.new("RGB", (width, height), "white"), 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + gap
    shrunk(sheet, path)


def shrunk(image: Image.Image, path: Path) -> None:
    """Write a picture with a palette of 128 colours, which halves its file at least."""
    image.convert("RGB").quantize(128).save(path, optimize=True)


def main() -> None:
    """Make the pictures that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PICTURES))
    parser.add_argument("--work", type=Path, default=Path("/tmp/pictures"))
    given = parser.parse_args()
    if unknown := set(given.names) - set(PICTURES):
        parser.error(f"no picture {', '.join(sorted(unknown))} ({', '.join(PICTURES)})")
    given.work.mkdir(parents=True, exist_ok=True)
    for name in given.names or PICTURES:
        PICTURES[name](given.work.resolve())


if __name__ == "__main__":
    main()
