"""The benchmark suites: the core, which needs torch only, everything of ours, and our peers."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from raygkd.bench.rows import Row, Rows
from raygkd.bench.spectral_rows import spectral_rows
from raygkd.bench.step_rows import classifier_rows, detector_rows, rival_rows

HELP_CALLS = 5


def core_rows(*, quick: bool) -> Rows:
    """Yield the cost of the losses, on a GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield from spectral_rows(device, quick=quick)
    yield from classifier_rows(device, quick=quick)
    yield from rival_rows(device, quick=quick)
    yield from detector_rows(device, quick=quick)


def whole_rows(*, quick: bool) -> Rows:
    """Yield the rows of the core, and the cost of Ray and the command line; starts Ray."""
    from raygkd.bench.ray_rows import ddp_rows, nested_seconds, stream_rows
    from raygkd.bench.search_rows import search_rows
    from raygkd.rayrun.cluster import cluster

    yield from core_rows(quick=quick)
    yield help_row()
    with tempfile.TemporaryDirectory(prefix="raygkd-bench-") as name:
        folder = Path(name)
        with cluster(None):
            # a value for comparison, which takes 15 seconds to measure
            nested = None if quick else nested_seconds(_new(folder / "nested"))
            yield from ddp_rows(_new(folder / "ddp"), quick=quick)
            yield from stream_rows(_new(folder / "stream"), quick=quick)
        yield from search_rows(folder / "search", nested, quick=quick)


def peer_rows(*, quick: bool) -> Rows:
    """Yield steps and a small job beside those of timm, torchdistill, Lightning and plain torch."""
    from raygkd.bench.peer_jobs import peer_job_rows
    from raygkd.bench.peer_steps import peer_step_rows

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield from peer_step_rows(device, quick=quick)
    yield from peer_job_rows(quick=quick)


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def help_row() -> Row:
    """Return how long ``raygkd --help`` takes."""
    seconds = []
    for _ in range(HELP_CALLS):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "raygkd", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    return Row(
        what="raygkd --help",
        against="",
        value=statistics.median(seconds),
        unit="s",
        bound=0.5,
        configuration={"seconds": seconds},
    )


SUITES = {"all": whole_rows, "core": core_rows, "peers": peer_rows}


def measured(suite: Callable[..., Iterator[Row]], *, quick: bool) -> list[Row]:
    """Return the rows of a suite; each is printed on standard error when done, with its time."""
    rows = []
    started = time.monotonic()
    for row in suite(quick=quick):
        seconds = time.monotonic() - started
        line = f"{row.what}: {row.value:.3g} {row.unit} ({seconds:.0f} s)"
        print(line, file=sys.stderr, flush=True)
        rows.append(row)
    return rows
