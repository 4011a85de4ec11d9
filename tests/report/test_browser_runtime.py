"""The page of the guide "Ship it" classifies an image in a real browser."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from browser import Opened, is_installed, opened
from lively import classifier_file
from torchvision.transforms.functional import to_pil_image

from raygkd.deploy.exporters.onnx import write_onnx
from raygkd.deploy.exporters.static_int8 import StaticInt8

pytestmark = [pytest.mark.e2e, pytest.mark.browser, pytest.mark.slow]
PAGE = Path(__file__).parents[2] / "examples" / "onnx_classifier.html"
SECONDS = 60.0


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a log."""

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder with onnxruntime-web and the page, and its address."""
    if not is_installed() or not shutil.which("npm"):
        pytest.skip("no browser, or no npm")
    folder = tmp_path_factory.mktemp("site")
    command = ("npm", "install", "--silent", "--ignore-scripts", "onnxruntime-web@1.30.0")
    if subprocess.run(command, cwd=folder, check=False).returncode:
        pytest.skip("npm cannot install onnxruntime-web")
    shutil.copy(PAGE, folder / "index.html")
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/index.html"
        server.shutdown()


def text_of(page: Opened, script: str) -> str:
    """Return what a script returns as soon as it is not empty."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if text := page.run(script):
            return text
        time.sleep(0.1)
    raise TimeoutError(script)


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_the_page_finds_what_onnxruntime_finds(
    site: tuple[Path, str], tmp_path: Path, kind: str
) -> None:
    folder, address = site
    model_file, model = classifier_file(side=32), folder / "student.onnx"
    run = write_onnx(model_file, tmp_path / "full.onnx")
    shutil.copy(tmp_path / "full.onnx", model)
    if kind == "int8":
        batch = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        run = StaticInt8(tmp_path / "full.onnx", [batch], tmp_path).write(model)
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    to_pil_image(pixels).save(tmp_path / "image.png")
    wanted = run(pixels[None] / 255)[0]
    with opened(address, tmp_path / "profile") as page:
        text_of(page, "return document.title === 'ready'")
        page.choose(tmp_path / "image.png")
        first, second = text_of(page, "return document.querySelector('pre').textContent").split(
            "\n"
        )
        logits = torch.tensor(json.loads(second))
        # the sums of 8-bit products may be rounded differently
        torch.testing.assert_close(logits, wanted, atol=1e-4 if kind == "float" else 0.02, rtol=0)
        assert first == f"class {int(logits.argmax())}"
