"""ExecuTorch programs say what the model says, in float and in 8 bits.

Shapes: B batch, S side of the square input.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lively import CLASSES, classifier_file, detector_file
from torch import Tensor

from raygkd.deploy.exporters.executorch import ExecuTorch
from raygkd.deploy.facts import facts_of
from raygkd.deploy.model import load_model
from raygkd.deploy.modules import student
from raygkd.errors import ConfigError, DataError
from raygkd.metrics.output_comparison import Agreement
from raygkd.models import ModelFile
from raygkd.storage.atomic_files import place

pytest.importorskip("executorch", reason="the extra executorch is not installed")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def noise(count: int, side: int) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5))


def outputs(model_file: ModelFile, images_BCSS: Tensor) -> Tensor:
    with torch.no_grad():
        return student(model_file)(images_BCSS)


def test_float_and_int8(tmp_path: Path) -> None:
    model_file = classifier_file(side=32)
    full, small = tmp_path / "full.pte", tmp_path / "small.pte"
    ExecuTorch().write(model_file, full)
    facts, run = load_model(place(full))
    assert facts == facts_of(model_file)
    assert facts.class_names == CLASSES
    for count in (1, 5):
        torch.testing.assert_close(
            run(noise(count, 32)), outputs(model_file, noise(count, 32)), atol=1e-4, rtol=0
        )
    assert b"site-packages" not in full.read_bytes()
    int8 = ExecuTorch().calibrate(model_file, full, [noise(32, 32)], tmp_path)
    run = int8.write(small)
    assert small.stat().st_size < 0.4 * full.stat().st_size
    agreement = Agreement()
    agreement.add(outputs(model_file, noise(64, 32)), run(noise(64, 32)))
    assert agreement.share is not None
    assert agreement.share > 0.8
    errors = int8.errors([noise(4, 32)])
    assert errors.keys() == set(int8.layers)
    assert all(0 < error < 0.2 for error in errors.values())
    left = int8.write(small, int8.layers)
    torch.testing.assert_close(left(noise(2, 32)), outputs(model_file, noise(2, 32)))
    assert small.stat().st_size > 0.9 * full.stat().st_size


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    with pytest.raises(ConfigError, match="cannot write detectors, whose number of boxes"):
        ExecuTorch().write(detector_file("fcos"), path)
    assert not path.exists()
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"model\.pte is damaged or not an ExecuTorch program"):
        load_model(place(path))
