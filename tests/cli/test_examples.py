"""The programs in ``examples/`` run, and say what they promise."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch
from lively import CLASSES, classifier_file
from torchvision.transforms.functional import to_pil_image

from raygkd.deploy.exporters.onnx import write_onnx
from raygkd.deploy.modules import student

EXAMPLES = Path(__file__).parents[2] / "examples"


def output_of(name: str, *arguments: str | Path, cwd: Path) -> str:
    """Return what an example prints."""
    command = [sys.executable, EXAMPLES / name, *arguments]
    ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_the_student_of_a_loop_gains_from_its_teacher(tmp_path: Path) -> None:
    told = output_of("own_loop.py", cwd=tmp_path)
    alone, taught = map(float, re.findall(r"student .*: (0\.\d+)", told))
    assert taught > alone + 0.03, told


@pytest.mark.slow
def test_images_of_a_program_are_searched_on(tmp_path: Path) -> None:
    told = output_of("own_images.py", cwd=tmp_path)
    assert "alone" in told.splitlines()[0]
    assert Path(told.split("report: ")[1].strip()).is_file()


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "which_student.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    pictures = [
        output.data
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 1


@pytest.mark.unit
def test_an_exported_student_needs_onnx_runtime_alone(tmp_path: Path) -> None:
    model_file, model = classifier_file("resnet20"), tmp_path / "student.onnx"
    write_onnx(model_file, model)
    expected = []
    for number in range(3):
        pixels_CHW = torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8)
        to_pil_image(pixels_CHW).save(tmp_path / f"{number}.png")
        with torch.inference_mode():
            chances_K = student(model_file)(pixels_CHW[None] / 255)[0].softmax(0)
        expected.append(f"{number}.png: {CLASSES[int(chances_K.argmax())]} ({chances_K.max():.2f})")
    images = [f"{number}.png" for number in range(3)]
    assert output_of("onnx_classifier.py", model, *images, cwd=tmp_path).splitlines() == expected
    imported = r"^(?:import|from) (\w+)"
    assert "raygkd" not in re.findall(imported, (EXAMPLES / "onnx_classifier.py").read_text(), re.M)


@pytest.mark.unit
def test_an_exported_student_in_c_plus_plus(tmp_path: Path) -> None:
    """With headers and library of ONNX Runtime, as its releases have them."""
    home = os.environ.get("ONNXRUNTIME_HOME")
    if home is None or not shutil.which("g++"):
        pytest.skip("ONNXRUNTIME_HOME does not name a release of ONNX Runtime, or there is no g++")
    program = tmp_path / "onnx_classifier"
    command = ("g++", "-std=c++17", EXAMPLES / "onnx_classifier.cpp", f"-I{home}/include")
    command += (f"-L{home}/lib", f"-Wl,-rpath,{home}/lib", "-lonnxruntime", "-o", program)
    subprocess.run(command, check=True)
    model_file, model = classifier_file("resnet20"), tmp_path / "student.onnx"
    write_onnx(model_file, model)
    pixels_CHW = torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8)
    to_pil_image(pixels_CHW).save(tmp_path / "image.ppm")
    with torch.inference_mode():
        wanted = int(student(model_file)(pixels_CHW[None] / 255)[0].argmax())
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=False)
    ran = run((program, model, tmp_path / "image.ppm"))
    assert ran.returncode == 0, ran.stderr
    number, facts = ran.stdout.splitlines()
    assert int(number) == wanted
    assert json.loads(facts)["class_names"] == list(CLASSES)
    to_pil_image(pixels_CHW[:, :5]).save(tmp_path / "small.ppm")
    ran = run((program, model, tmp_path / "small.ppm"))
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"error: {tmp_path}/small.ppm must have 12 x 12 pixels\n"
