"""Finished models on a run's images, in this process or in a task on a GPU node.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from raygkd.assembly.training import file_normaliser
from raygkd.engine.tasks import pixels
from raygkd.models import ModelFile, build_from_file
from raygkd.rayrun.image_stream import RayStream, SharedImages

Given = ParamSpec("Given")
Result = TypeVar("Result")
# of a batch, the input (B, C, H, W) of the model
Inputs = Callable[[Mapping[str, Tensor]], Tensor]


def here_or_on_gpu(
    function: Callable[Given, Result], gpus: float
) -> Callable[Given, Callable[[], Result]]:
    """Return a function that starts another, and returns what gives its result.

    In this process, which saves a start, it runs when the result is asked for; if a GPU is
    requested and this process has none, it runs at once in a task on a GPU node.

    Args:
        function: its arguments and result can be serialised.
        gpus: of the task, 0 to 1.
    """
    if not gpus or torch.cuda.is_available():
        return partial(partial, function)
    import ray

    # the tasks take no CPU: as many of them as there are CPUs would leave none for their streams
    task = ray.remote(num_cpus=0, num_gpus=gpus)(function)

    def start(*args: Given.args, **kwargs: Given.kwargs) -> Callable[[], Result]:
        return partial(ray.get, task.remote(*args, **kwargs))

    return start


@contextlib.contextmanager
def model_on_images(
    model_file: ModelFile, images: SharedImages, batch_size: int
) -> Iterator[tuple[nn.Module, RayStream, Inputs]]:
    """Yield a model in eval mode, the stream of images, and what makes its input of a batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    normalise = file_normaliser(model_file, device)
    stream = RayStream(images, batch_size=batch_size, seed=0, epochs=range(0), rank=0, world_size=1)
    with contextlib.closing(stream):
        model = build_from_file(model_file).to(device)
        yield model, stream, lambda batch: normalise(pixels(batch, device))
