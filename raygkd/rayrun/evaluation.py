"""Scores and costs of finished models, measured side by side.

Shapes: B batch, S side of the square input.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from raygkd.deploy.exporters.formats import format_of
from raygkd.deploy.model import load_model, packed, unpacked
from raygkd.deploy.modules import Run, student
from raygkd.engine.measure import MIB, peak_bytes
from raygkd.engine.tasks import pixels
from raygkd.metrics.latency import hardware, latencies
from raygkd.metrics.model_scores import OutputMeter
from raygkd.models import build_from_file, count_parameters, load_model_file
from raygkd.rayrun.image_stream import RayStream, SharedImages
from raygkd.storage.atomic_files import Place
from raygkd.storage.temporary import temporary_folder

CPU = torch.device("cpu")
# turns of a batch at least, of which each is worth many of one image
FEWEST_BATCHES = 5
Progress = Callable[[int, int], None]


def evaluate_models(
    models: Mapping[str, Place],
    images: SharedImages,
    split: str,
    *,
    count: int,
    batch_size: int,
    gpus: float,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Return name -> results of ``OutputMeter.compute`` and ``_costs``, and "device".

    Runs in this process or, if a GPU is requested and this process has none, in a task on a GPU
    node.

    Args:
        models: name -> model file or exported file.
        images: the shared images.
        split: which of them.
        count: of the images in the split.
        batch_size: images at a time.
        gpus: per model, 0 to 1.
        progress: is called with the images done and their number, if known.
    """
    contents = {name: packed(path) for name, path in models.items()}
    if not gpus or torch.cuda.is_available():
        return _evaluate(contents, images, split, count, batch_size, progress)
    import ray

    task = ray.remote(num_cpus=0, num_gpus=gpus)(_evaluate)
    return ray.get(task.remote(contents, images, split, count, batch_size, _ignore_progress))


def _ignore_progress(done: int, total: int) -> None:
    """Ignore progress, which a task cannot report."""


def _evaluate(
    contents: Mapping[str, Mapping[str, bytes]],
    images: SharedImages,
    split: str,
    count: int,
    batch_size: int,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(temporary_folder("files"))
        paths = {}
        for number, (name, files) in enumerate(contents.items()):
            own = folder / str(number)
            own.mkdir()
            paths[name] = unpacked(files, own)
        runs = {name: load_model(path)[1] for name, path in paths.items()}
        results, sample_BCSS = _scored(runs, images, split, count, batch_size, progress)
        costs = _costs(paths, runs, sample_BCSS, batch_size)
    return {name: results[name] | costs[name] for name in contents}


def _scored(
    runs: Mapping[str, Run],
    images: SharedImages,
    split: str,
    count: int,
    batch_size: int,
    progress: Progress,
) -> tuple[dict[str, dict[str, Any]], Tensor]:
    """Return name -> scores, and the first batch of images in 0..1; each is read once."""
    stream = RayStream(images, batch_size=batch_size, seed=0, epochs=range(0), rank=0, world_size=1)
    meters = {name: OutputMeter(images.spec, stream.boxes) for name in runs}
    first_BCSS, done = None, 0
    with contextlib.closing(stream):
        for batch in stream.eval_batches(split):
            images_BCSS = pixels(batch, CPU)
            first_BCSS = images_BCSS if first_BCSS is None else first_BCSS
            for name, run in runs.items():
                meters[name].update(run(images_BCSS), batch)
            done += len(images_BCSS)
            progress(done, count)
    results = {name: meter.compute() for name, meter in meters.items()}
    # what has no images has raised by now
    assert first_BCSS is not None
    return results, first_BCSS


def _costs(
    paths: Mapping[str, Path], runs: Mapping[str, Run], sample_BCSS: Tensor, batch_size: int
) -> dict[str, dict[str, Any]]:
    """Return name -> costs of a model.

    "parameters"; "flops" of one image, two for a multiplication with its addition, as
    ``torch.utils.flop_counter`` counts them; "memory_mb", MiB of weights and of the tensors alive
    at their most; these three None of an exported file, whose graph is not torch's. "latency_ms",
    median and p95, with the way to the device and back. The last two for one image and for a batch.
    """
    batches = {1: {}, batch_size: {"batch": batch_size, "fewest": FEWEST_BATCHES}}
    subjects = {name: (run, sample_BCSS) for name, run in runs.items()}
    timed = {
        size: latencies(subjects, _ignore_progress, **limits) for size, limits in batches.items()
    }
    costs: dict[str, dict[str, Any]] = {}
    for name, path in paths.items():
        is_exported = format_of(path) is not None
        device = CPU if is_exported or not torch.cuda.is_available() else torch.device("cuda")
        known: dict[str, Any] = {"parameters": None, "flops": None, "memory_mb": None}
        if not is_exported:
            known = _of_module(path, runs[name], sample_BCSS, batches, device)
        costs[name] = {
            **(
                known if is_exported else _of_module(path, runs[name], sample_BCSS, batches, device)
            ),
            "latency_ms": {str(size): asdict(of[name]) for size, of in timed.items()},
            "hardware": hardware(device),
        }
    return costs


def _of_module(
    path: Path, run: Run, sample_BCSS: Tensor, sizes: Mapping[int, Any], device: torch.device
) -> dict[str, Any]:
    """Return the costs that are only known of a torch model."""
    model_file = load_model_file(path)
    module = student(model_file)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(sample_BCSS[:1])
    tensors = [*module.parameters(), *module.buffers()]
    weights = sum(tensor.nbytes for tensor in tensors)
    peaks = {}
    for size in sizes:
        images_BCSS = sample_BCSS[[number % len(sample_BCSS) for number in range(size)]]
        peaks[str(size)] = (weights + peak_bytes(functools.partial(run, images_BCSS), device)) / MIB
    return {
        "parameters": count_parameters(build_from_file(model_file)),
        "flops": counter.get_total_flops(),
        "memory_mb": peaks,
    }
