"""What is measured: its verdicts, its sizes at their smallest, and the ratios that are stable.

Shape letters: B batch, C channels, H height, W width, d spectral dimension.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys

import pytest
import torch

from raygkd.bench.rows import Row, machine, text_table
from raygkd.bench.runs import SameBatch, classes_spec, make_training, random_batch, random_scenes
from raygkd.bench.spectral_rows import dense_embedding
from raygkd.bench.step_rows import CLASSIFIERS
from raygkd.engine import training_step
from raygkd.engine.measure import interleaved, peak_bytes, state_bytes
from raygkd.graph import spectral_embedding

torch.set_num_threads(1)
CPU = torch.device("cpu")


def row(value: float, bound: float, *, at_least: bool = False) -> Row:
    return Row(what="a", against="b", value=value, unit="x", bound=bound, at_least=at_least)


@pytest.mark.parametrize(
    ("value", "bound", "at_least", "verdict"),
    [
        *((1.0, 1.2, False, "met"), (1.2, 1.2, False, "met"), (1.21, 1.2, False, "missed")),
        *((100.0, 99.0, True, "met"), (98.0, 99.0, True, "missed")),
        *((math.nan, 1.0, False, "missed"), (math.nan, 1.0, True, "missed")),
    ],
)
def test_a_verdict_is_the_bound_held_to_the_figure(
    value: float, bound: float, at_least: bool, verdict: str
) -> None:
    assert row(value, bound, at_least=at_least).verdict == verdict


def test_table_has_a_line_for_each_row_and_says_where_it_was_measured():
    rows = [row(1.234, 1.2), row(250.0, 100.0, at_least=True)]
    lines = text_table(rows, {"cpu": "a processor", "gpu": None}).splitlines()
    assert lines[2].split() == ["a", "b", "1.23x", "<=", "1.2x", "missed"]
    assert lines[3].split() == ["a", "b", "250x", ">=", "100x", "met"]
    assert lines[-1] == "1 met, 1 missed; cpu a processor"


def test_rows_are_plain_values_for_programs():
    plain = json.loads(json.dumps(row(1.0, 2.0).as_json()))
    assert (plain["value"], plain["bound"], plain["verdict"]) == (1.0, 2.0, "met")
    assert {"cpu", "cores", "python", "torch", "torchvision"} <= machine().keys()


@pytest.mark.parametrize("shape", [(2, 12, 2, 2), (2, 6, 4, 4)])
def test_the_plain_way_finds_what_ours_does(shape: tuple[int, ...]) -> None:
    features_BCHW = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    values_Bd, vectors_BCd = spectral_embedding(features_BCHW, 3)
    plain_values_Bd, plain_vectors_BCd = dense_embedding(features_BCHW, 3)
    torch.testing.assert_close(plain_values_Bd, values_Bd, rtol=1e-3, atol=1e-5)
    overlap_Bd = (vectors_BCd * plain_vectors_BCd).sum(1).abs()
    torch.testing.assert_close(overlap_Bd, torch.ones_like(overlap_Bd), rtol=1e-3, atol=1e-3)


def test_scenes_are_what_a_detector_learns_from():
    spec, stream = random_scenes(2, 96, 3)
    training = make_training(
        {
            "teacher": "fasterrcnn_resnet18_fpn64",
            "student": "fasterrcnn_mobilenet_v3_small_fpn64",
            **{"method": "fgd", "batch_size": 2, "lr": 1e-4, "clip_norm": 10.0},
        },
        spec,
        stream,
        CPU,
    )
    terms, _ = training_step(training, stream.batch)
    assert terms["task"] > 0
    assert terms["fgd"] > 0


def test_core_is_measured_by_a_command_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "raygkd.bench", "cor"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "invalid choice: 'cor'" in done.stderr


# Ratios that are stable, with generous margins: work shared over many channels stays shared


def test_embedding_of_many_channels_is_far_faster_than_the_plain_way():
    features_BCHW = torch.rand(1, 1024, 4, 4).requires_grad_()

    def there_and_back(embedding) -> None:
        values_Bd, vectors_BCd = embedding(features_BCHW, 4)
        loss = (vectors_BCd.square() * values_Bd[:, None, :]).square().sum()
        torch.autograd.grad(loss, features_BCHW)

    sides = {"ours": spectral_embedding, "dense": dense_embedding}
    timings = interleaved({n: functools.partial(there_and_back, f) for n, f in sides.items()}, 3)
    # some 200 times on a quiet machine
    assert timings.ratio("dense", "ours") > 10


def test_graph_losses_cost_a_step_little_time_and_memory():
    spec = classes_spec(10, 32)
    stream = SameBatch(random_batch(16, spec))
    trainings = {
        method: make_training({**CLASSIFIERS, "method": method}, spec, stream, CPU)
        for method in ("kd", "graph")
    }
    steps = {
        method: functools.partial(training_step, training, stream.batch)
        for method, training in trainings.items()
    }
    memory = {
        method: peak_bytes(steps[method], CPU) + state_bytes(training)
        for method, training in trainings.items()
    }
    assert memory["graph"] < 1.3 * memory["kd"]
    # the terms once were more than the rest of the step together
    assert interleaved(steps, 3).ratio("graph", "kd") < 2.0
