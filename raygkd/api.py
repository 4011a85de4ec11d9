"""Distillation of your own models, in one process: ``raygkd.distill`` and ``raygkd.Matching``.

Shapes: B batch, C channels, H height, W width, K classes, N images.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raygkd.assembly.model_pairs import (
    Levels,
    ModelPair,
    ScaledTeacher,
    as_it_was,
    check_gradients,
    check_images,
    check_parallel,
)
from raygkd.assembly.optimizers import build_optimizer
from raygkd.assembly.own_task import OwnTask, check_functions, chosen_device, logits, loss_of
from raygkd.config import Config, MethodConfig, OptimConfig, with_settings
from raygkd.data.pairs import Data, PairStream
from raygkd.engine import Objective, Teacher, TeacherOutput, Training, run_epoch
from raygkd.engine.schedule import lr_factor
from raygkd.errors import ConfigError, Diverged, brief
from raygkd.losses import GraphDistillationLoss
from raygkd.models import FeatureTap

Loss = Callable[[Any, Any], Tensor]
Metric = Callable[[Tensor, Tensor], Any]
Optimiser = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
# images whose feature maps are looked at
PROBED = 2


def accuracy(outputs_NK: Tensor, labels_N: Tensor) -> float:
    """Return the fraction of images whose highest output is that of their label.

    >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([0, 1, 1]))
    0.6666666865348816
    """
    return float((outputs_NK.argmax(1) == labels_N).float().mean())


class Matching(nn.Module):
    """The graph losses between two models, for your own training loop.

    Its only parameters are the adapters: pass them to the optimiser together with the student's.
    The teacher is frozen, put into eval mode in every call, and run without gradient. Neither model
    is part of this module; ``close`` removes its hooks from them.

    Under DistributedDataParallel, wrap one module that holds the student and this one, and whose
    forward calls this one. Compile models after this.

    Examples:
        >>> from raygkd.models import build_model
        >>> images = torch.rand(4, 3, 32, 32)
        >>> teacher, student = (build_model(name, 10, (32, 32)) for name in ("resnet14", "resnet8"))
        >>> matching = Matching(teacher, student, images, levels=["stage2", "stage3"])
        >>> outputs, loss = matching(images)
        >>> (F.cross_entropy(outputs, torch.zeros(4, dtype=torch.long)) + loss).backward()
        >>> matching.close()

    Args:
        teacher: the model whose feature maps are matched.
        student: the model that learns.
        images: a batch that both models accept (B, ...), to determine the shapes of the maps.
        levels: paths of modules in both models, or paths in the student -> paths in the teacher.
            Their outputs must be feature maps (B, C, H, W) or tokens (B, N, C) of a grid. None
            finds levels in both models and pairs them by resolution and depth.
        alpha: factor of the vertex loss; it is not relative to the labels' gradient, which is not
            known here. At 40, the loss moves a small ResNet about three times as much as the
            labels do.
        beta: weight of the edge loss.
        gamma: weight of the spectral loss.
        temperature: attention temperature, above 0, in units of the maps' mean magnitude.
        dim: spectral dimension, below the teacher's number of channels at every level; None for 8,
            or less if a level has too few channels.
        return_terms: whether calls return the terms instead of their weighted sum, each with a
            gradient of its own, for weights that change, such as GradNorm's, or a logger.
        accelerated: whether the gradient is computed with the loss. It is faster, but allows one
            backward pass only; pass False for ``retain_graph``, or to keep the losses of several
            batches for one backward pass. ``return_terms`` implies False.

    Raises:
        ConfigError: a model lacks a level, fails on the images, or shares parameters with the
            other; or a setting is out of range.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        images: Tensor,
        *,
        levels: Levels = None,
        alpha: float = 40.0,
        beta: float = 0.0,
        gamma: float = 0.0,
        temperature: float = MethodConfig.temperature,
        dim: int | None = None,
        return_terms: bool = False,
        accelerated: bool = True,
    ):
        super().__init__()
        # adapters made in inference mode could not be trained
        with torch.inference_mode(mode=False):
            pair = ModelPair.of(teacher, student, levels, images)
            shapes, teacher_shapes, scales = pair.shapes(images)
            self.graph = _graph(
                shapes, teacher_shapes, alpha, beta, gamma, temperature, dim, accelerated
            )
            self.graph.to(images.device)
        self._returns_terms, self._is_accelerated = return_terms, accelerated
        self._is_checked = False
        # in a list, the models are not part of this module
        self._models = [
            (pair, ScaledTeacher(pair.teacher, scales), FeatureTap(pair.student, list(shapes)))
        ]

    def forward(self, images: Tensor) -> tuple[Any, Any]:
        """Return the student's outputs, and the weighted sum of the graph losses (a scalar).

        With ``return_terms``, instead of the sum "vertex", "edge" and "spectral" -> its loss, a
        scalar without its weight, of those whose weight is not 0.

        Raises:
            ConfigError: there are no images, no gradient reaches the student, or
                DistributedDataParallel does not share all gradients.
        """
        [(pair, teacher, tap)] = self._models
        check_images(images)
        if not self._is_checked and torch.is_grad_enabled():
            check_parallel(self, pair.student)
            self._is_checked = True
        said = teacher(images)
        outputs, features = tap(images)
        check_gradients(features, pair.student)
        terms = self._terms(features, said)
        if self._returns_terms:
            return outputs, terms
        weighted = [self.graph.term_weights[name] * term for name, term in terms.items()]
        return outputs, torch.stack(weighted).sum()

    # a loop may compile its whole step
    @torch.compiler.disable
    def _terms(self, features: Mapping[int, Tensor], said: TeacherOutput) -> dict[str, Tensor]:
        if self._returns_terms or not self._is_accelerated:
            return self.graph(features, said.features)
        return self.graph.terms_with_gradient(features, said.features)

    def close(self) -> None:
        """Remove the hooks from both models."""
        [(_, teacher, tap)] = self._models
        teacher.close()
        tap.remove()


def distill(
    teacher: nn.Module,
    student: nn.Module,
    train_data: Data,
    val_data: Data | None = None,
    *,
    levels: Levels = None,
    epochs: int = OptimConfig.epochs,
    batch_size: int = OptimConfig.batch_size,
    lr: float = OptimConfig.lr,
    alpha: float = MethodConfig.alpha,
    beta: float = MethodConfig.beta,
    gamma: float = MethodConfig.gamma,
    weights_unit: str = MethodConfig.weights_unit,
    temperature: float = MethodConfig.temperature,
    dim: int | None = None,
    loss: Loss = F.cross_entropy,
    metric: Metric = accuracy,
    optimizer: Optimiser | None = None,
    device: torch.device | str | None = None,
    seed: int = OptimConfig.seed,
    keep: str = "last",
    reporter: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Train a student with its labels and the graphs of a teacher's channels; return the history.

    The student is trained in place, on one device, and is in eval mode at the end; the teacher is
    not changed. Both models get the images as the data returns them. Modules of the student that
    are in eval mode while others are in train mode stay in it.

    Examples:
        >>> from raygkd.models import build_model
        >>> images, labels = torch.rand(32, 3, 8, 8), torch.arange(32) % 4
        >>> data = torch.utils.data.TensorDataset(images, labels)
        >>> teacher, student = (build_model(name, 4, (8, 8)) for name in ("resnet14", "resnet8"))
        >>> history = distill(teacher, student, data, data, epochs=2, levels=["stage1"])
        >>> [one["epoch"] for one in history], 0 <= history[-1]["val_score"] <= 1
        ([1, 2], True)

    Args:
        teacher: a trained model.
        student: the model that learns.
        train_data: a map-style dataset of pairs (image, label), or a ``DataLoader`` of batches of
            such pairs (B, ...).
        val_data: the same, for the metric; None to skip validation.
        levels: paths of modules in both models, or paths in the student -> paths in the teacher.
            Their outputs must be feature maps (B, C, H, W) or tokens (B, N, C) of a grid. None
            finds levels in both models and pairs them by resolution and depth.
        epochs: passes over the training data.
        batch_size: images per step, if the data is a dataset.
        lr: peak learning rate; it falls to 0 along a cosine.
        alpha: weight of the vertex loss; unlike in the commands, weights do not fade.
        beta: weight of the edge loss.
        gamma: weight of the spectral loss.
        weights_unit: "gradient" for weights relative to the labels' gradient in the student,
            measured over the first steps, or "loss" for factors of the losses.
        temperature: of the attention, above 0, in units of the maps' mean magnitude.
        dim: spectral dimension, below the teacher's channels at every level; None for 8 or what
            there is.
        loss: function of a batch's outputs and labels that returns a scalar. The outputs are the
            student's, or their ``logits`` if they have them, as in Hugging Face's models.
        metric: function of the same outputs (N, ...) of all validation images and their labels
            (N, ...) that returns a number: "val_score" in the history. Outputs may be dicts, tuples
            and lists of tensors.
        optimizer: function that takes the parameters of student and adapters and returns an
            optimiser; None for SGD with momentum 0.9, and weight decay 5e-4 of the student's
            weights, but not of its biases and norms, nor of the adapters.
        device: device to train on; None for the GPU if there is one, else the CPU.
        seed: seed of the order of a dataset's images; torch's own generators are not changed.
        keep: which weights the student has at the end: "last", or "best" for those of the epoch
            with the highest "val_score".
        reporter: called with the metrics of each epoch.

    Returns:
        The metrics of each epoch, among them "epoch" (from 1), "train_loss", "loss_task",
        "loss_vertex", "loss_edge" and "loss_spectral" (unweighted, if their weight is not 0),
        "val_score" (with ``val_data``), "lr" and "epoch_seconds".

    Raises:
        ConfigError: a model lacks a level, or a setting is out of range.
        DataError: the data has another form, or too few images for a batch.
        Diverged: the loss is not finite.
    """
    given = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "weights_unit": weights_unit,
    }
    if keep not in ("last", "best") or (keep == "best" and val_data is None):
        raise ConfigError(f'keep: {keep!r} must be "last", or "best" with val_data')
    check_functions(loss, metric, optimizer, reporter)
    place = chosen_device(device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_python_names())
        # whatever the caller is in
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        # the grace period is a search's
        optim = with_settings(Config(), {**given, "grace_period": 1}).optim
        stack.enter_context(torch.random.fork_rng([place] if place.type == "cuda" else []))
        stream = PairStream(train_data, val_data, batch_size, seed)
        images = next(stream.train_batches(0))["image"][:PROBED].to(place)
        for model in (teacher, student):
            # of anything else the pair says so
            if isinstance(model, nn.Module):
                model.to(place)
        pair = ModelPair.of(teacher, student, levels, images)
        if not any(parameter.requires_grad for parameter in student.parameters()):
            raise ConfigError("student: all its parameters are frozen; set requires_grad of some")
        student_shapes, teacher_shapes, scales = pair.shapes(images)
        graph = _graph(student_shapes, teacher_shapes, alpha, beta, gamma, temperature, dim)
        stack.enter_context(as_it_was(teacher))
        listened = ScaledTeacher(pair.teacher, scales)
        stack.callback(listened.close)
        objective = _Objective(
            pair.student,
            loss,
            levels=list(student_shapes),
            graph=graph,
            shares=graph.term_weights if weights_unit == "gradient" else (),
        )
        stack.callback(objective.close)
        objective.to(place)
        if optimizer is None:
            optimizer = functools.partial(_usual, optim, student)
        training = _training(objective, listened, stream, OwnTask(metric, place), optim, optimizer)
        history = []
        best: tuple[float, dict[str, Tensor]] | None = None
        for _ in range(epochs):
            history.append(run_epoch(training))
            if reporter is not None:
                reporter(dict(history[-1]))
            score = history[-1].get("val_score", math.nan)
            if keep == "best" and (best is None or score > best[0] or math.isnan(best[0])):
                best = score, copy.deepcopy(student.state_dict())
        if best is not None:
            student.load_state_dict(best[1])
    student.eval()
    return history


class _Diverged(Diverged):
    """A loss that is not finite, with advice on the arguments of ``distill``."""

    def __str__(self) -> str:
        """Return what to change."""
        return (
            f"loss '{self.term}' is not finite in epoch {self.epoch}; lower lr, or the weights "
            "alpha, beta and gamma"
        )


@contextlib.contextmanager
def _python_names() -> Iterator[None]:
    """Name settings in errors as arguments, not as options of the command line."""
    try:
        yield
    except ConfigError as error:
        text = str(error).removeprefix("configuration: ")
        text = re.sub(r"--([a-z][a-z-]*)", lambda found: found[1].replace("-", "_"), text)
        raise type(error)(text) from error
    except Diverged as error:
        raise _Diverged(error.term, error.epoch) from error


def _training(
    objective: Objective,
    teacher: Teacher,
    stream: PairStream,
    task: OwnTask,
    optim: OptimConfig,
    optimizer: Optimiser,
) -> Training:
    """Return a run of this process alone, ready for its first epoch."""
    stepping = optimizer(objective.parameters())
    if not isinstance(stepping, torch.optim.Optimizer) or isinstance(stepping, torch.optim.LBFGS):
        raise ConfigError(
            f"optimizer: must return a torch.optim.Optimizer, and not LBFGS; got {brief(stepping)}"
        )
    factor = functools.partial(lr_factor, steps_per_epoch=stream.steps_per_epoch, optim=optim)
    return _Training(
        task=task,
        objective=objective,
        parallel=objective,
        teacher=teacher,
        stream=stream,
        optimizer=stepping,
        schedule=torch.optim.lr_scheduler.LambdaLR(stepping, factor),
        scaler=torch.amp.GradScaler(task.device.type, enabled=False),
        normalise=_unchanged,
        teacher_normalise=_unchanged,
        device=task.device,
        begun=None,
        epochs=optim.epochs,
        seed=optim.seed,
    )


def _usual(
    optim: OptimConfig, student: nn.Module, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return SGD with weight decay of the student's weights alone, as is usual."""
    decayed = {id(one) for one in student.parameters() if one.ndim > 1}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in parameters:
        groups[id(parameter) in decayed].append(parameter)
    plain: list[dict[str, Any]] = [{"params": groups[True]}]
    return build_optimizer(optim, [*plain, {"params": groups[False], "weight_decay": 0.0}])


def _unchanged(images: Tensor) -> Tensor:
    return images


def _graph(
    student_shapes: Mapping[int, tuple[int, int, int]],
    teacher_shapes: Mapping[int, tuple[int, int, int]],
    alpha: float,
    beta: float,
    gamma: float,
    temperature: float,
    dim: int | None,
    accelerated: bool = True,
) -> GraphDistillationLoss:
    numbers = {"alpha": alpha, "beta": beta, "gamma": gamma, "temperature": temperature}
    wrong = [f"{name}: {one!r} must be a number" for name, one in numbers.items() if _is_no(one)]
    if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int)):
        wrong.append(f"dim: {dim!r} must be a whole number or None")
    if wrong:
        raise ConfigError("; ".join(wrong))
    most = min(channels for channels, _, _ in teacher_shapes.values()) - 1
    return GraphDistillationLoss(
        student_shapes,
        teacher_shapes,
        adapter=MethodConfig.adapter,
        temperature=temperature,
        relative_temperature=True,
        graphs=MethodConfig.graphs,
        dim=max(1, min(MethodConfig.dim, most)) if dim is None else dim,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        accelerated=accelerated,
    )


def _is_no(number: Any) -> bool:
    """Return whether an argument is anything but a number."""
    return isinstance(number, bool) or not isinstance(number, int | float)


class _Objective(Objective):
    """The user's loss and the graph losses."""

    def __init__(self, student: nn.Module, loss: Loss, **parts: Any):
        super().__init__(student, **parts)
        self._loss = loss
        # a student that is in eval mode as a whole was left so by what used it last
        modules = list(student.modules())[1:]
        is_partly = any(module.training for module in modules)
        self._frozen = [one for one in modules if not one.training] if is_partly else []

    def train(self, mode: bool = True) -> _Objective:
        """Switch the mode, but of modules that the user has put into eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.training = False
        return self

    def forward(
        self, images_BCHW: Tensor, targets: Any, teacher: TeacherOutput | None
    ) -> tuple[dict[str, Tensor], Any]:
        outputs, features = self._tap(images_BCHW)
        outputs = logits(outputs)
        if self._loss is F.cross_entropy and not isinstance(outputs, Tensor):
            raise ConfigError(
                f"loss: the student returns a {type(outputs).__name__} without logits, which "
                "cross_entropy cannot read; pass a loss that can"
            )
        terms = {"task": loss_of(self._loss, outputs, targets)}
        return terms | self._distillation(features, teacher), None


class _Training(Training):
    """A run whose images are what the models take."""

    def to_device(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        return batch["image"].to(self.device), self.task.targets(batch, self.device)
