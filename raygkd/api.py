"""Distillation of anybody's models, in one process: ``raygkd.distill`` and ``raygkd.Matching``.

Shapes: B batch, C channels, H height, W width, K classes, N images.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raygkd.assembly.optimizers import build_optimizer
from raygkd.config import Config, MethodConfig, OptimConfig, with_settings
from raygkd.data.pairs import Data, PairStream
from raygkd.engine import Objective, Teacher, TeacherOutput, Training, run_epoch
from raygkd.engine.schedule import lr_factor
from raygkd.errors import ConfigError
from raygkd.losses import GraphDistillationLoss
from raygkd.models import FeatureTap, NamedLevels, feature_shapes, pair_levels, stage_modules

Levels = Sequence[str] | Mapping[str, str] | None
Loss = Callable[[Any, Any], Tensor]
Metric = Callable[[Tensor, Tensor], Any]
Optimiser = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
# images whose feature maps are looked at
PROBED = 2


def accuracy(outputs_NK: Tensor, labels_N: Tensor) -> float:
    """Return the share of images whose highest output is that of their label.

    >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([0, 1, 1]))
    0.6666666865348816
    """
    return float((outputs_NK.argmax(1) == labels_N).float().mean())


class Matching(nn.Module):
    """The graph losses between two models, for a training loop of anybody's.

    Its parameters are the adapters alone: give them to the optimiser beside the student's. The
    teacher is frozen and put into eval mode, and asked without gradient. Neither model is a part of
    this module; ``close`` takes its hooks off them.

    >>> from raygkd.models import build_model
    >>> images = torch.rand(4, 3, 32, 32)
    >>> teacher, student = (build_model(name, 10, (32, 32)) for name in ("resnet14", "resnet8"))
    >>> matching = Matching(teacher, student, images, levels=["stage2", "stage3"])
    >>> outputs, loss = matching(images)
    >>> (F.cross_entropy(outputs, torch.zeros(4, dtype=torch.long)) + loss).backward()
    >>> matching.close()

    Args:
        teacher: whose feature maps are matched.
        student: the model that learns.
        images: some images as both models take them (B, ...), which the maps' shapes are learnt of.
        levels: paths of modules in both models, or those of the student -> those of the teacher,
            whose outputs are feature maps (B, C, H, W) or tokens (B, N, C) of a grid; None finds
            those of both models and pairs them by resolution and depth.
        alpha: weight of the vertex loss: what it is multiplied by, since the labels' gradient is
            not known here. At 40 it moves a small ResNet about three times as much as they do.
        beta: weight of the edge loss.
        gamma: weight of the spectral loss.
        temperature: of the attention, above 0, in units of the maps' mean magnitude.
        dim: spectral dimension, below the teacher's channels at every level; None for 8 or what
            there is.

    Raises:
        ConfigError: levels that the models do not have, or settings that are not allowed.
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
    ):
        super().__init__()
        pair = _Pair.of(teacher, student, levels, images)
        shapes = pair.shapes(images)
        self.graph = _graph(*shapes, alpha, beta, gamma, temperature, dim)
        # a list is no part of the module, and so are not the models in it
        self._models = [pair.tapped(list(shapes[0]))]

    def forward(self, images: Tensor) -> tuple[Any, Tensor]:
        """Return the student's outputs and the weighted sum of the graph losses (a scalar)."""
        [(teacher, tap)] = self._models
        said = teacher(images)
        outputs, features = tap(images)
        terms = self.graph.terms_with_gradient(features, said.features)
        weighted = [self.graph.term_weights[name] * term for name, term in terms.items()]
        return outputs, torch.stack(weighted).sum()

    def close(self) -> None:
        """Take the hooks off both models."""
        [(teacher, tap)] = self._models
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
    reporter: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Train a student with its labels and the graphs of a teacher's channels; return the history.

    The student is trained in place, on this process's device alone, and is in eval mode at the end;
    the teacher stays what it was. Images reach both models as the data gives them.

    >>> from raygkd.models import build_model
    >>> images, labels = torch.rand(32, 3, 8, 8), torch.arange(32) % 4
    >>> data = torch.utils.data.TensorDataset(images, labels)
    >>> teacher, student = (build_model(name, 4, (8, 8)) for name in ("resnet14", "resnet8"))
    >>> history = distill(teacher, student, data, data, epochs=2, batch_size=16, levels=["stage1"])
    >>> [one["epoch"] for one in history], 0 <= history[-1]["val_score"] <= 1
    ([1, 2], True)

    Args:
        teacher: a trained model.
        student: the model that learns.
        train_data: what has a length and gives a pair (image, label) by number, as a map-style
            dataset does, or a ``DataLoader`` of batches of such pairs (B, ...).
        val_data: the same for the metric; None measures nothing.
        levels: paths of modules in both models, or those of the student -> those of the teacher,
            whose outputs are feature maps (B, C, H, W) or tokens (B, N, C) of a grid; None finds
            those of both models and pairs them by resolution and depth.
        epochs: passes over the training data.
        batch_size: images of a step, where a dataset is given.
        lr: learning rate at its highest; it falls to 0 along a cosine.
        alpha: weight of the vertex loss; weights do not fade here, as those of the commands do.
        beta: weight of the edge loss.
        gamma: weight of the spectral loss.
        weights_unit: "gradient" for weights that are shares of the labels' gradient in the student,
            over the first steps, or "loss" for what the losses are multiplied by.
        temperature: of the attention, above 0, in units of the maps' mean magnitude.
        dim: spectral dimension, below the teacher's channels at every level; None for 8 or what
            there is.
        loss: of the student's outputs, or their ``logits`` where they have those as Hugging Face's
            models do, and the labels of a batch, a scalar.
        metric: of the same outputs (N, ...) of all validation images and their labels (N, ...), a
            number; "val_score" in the history.
        optimizer: makes the optimiser of the parameters it is given, the student's and the
            adapters'; None for SGD with momentum 0.9 and weight decay 5e-4.
        device: where to train; None for the GPU, where there is one.
        seed: of the order of a dataset's images; torch's own generators stay as they were.
        reporter: is called with the metrics of each epoch.

    Returns:
        The numbers of each epoch: "epoch" from 1, "train_loss", "loss_task", "loss_vertex",
        "loss_edge" and "loss_spectral" (unweighted, where their weight is not 0), "val_score"
        where there is ``val_data``,
        "lr" and "epoch_seconds" among them.

    Raises:
        ConfigError: levels that the models do not have, or settings that are not allowed.
        DataError: data of another kind, or too few images for a batch.
        Diverged: the loss is not finite.
    """
    given = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "weights_unit": weights_unit,
    }
    # the grace period is a search's
    optim = with_settings(Config(), {**given, "grace_period": 1}).optim
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([place] if place.type == "cuda" else []))
        stream = PairStream(train_data, val_data, batch_size, seed)
        images = next(stream.train_batches(0))["image"][:PROBED].to(place)
        pair = _Pair.of(teacher.to(place), student.to(place), levels, images)
        student_shapes, teacher_shapes = pair.shapes(images)
        graph = _graph(student_shapes, teacher_shapes, alpha, beta, gamma, temperature, dim)
        stack.enter_context(_as_it_was(teacher))
        listened = pair.listening(list(teacher_shapes))
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
            optimizer = functools.partial(_usual, optim)
        training = _training(objective, listened, stream, _Task(metric, place), optim, optimizer)
        history = []
        for _ in range(epochs):
            history.append(run_epoch(training))
            if reporter is not None:
                reporter(history[-1])
    student.eval()
    return history


def _training(
    objective: Objective,
    teacher: Teacher,
    stream: PairStream,
    task: _Task,
    optim: OptimConfig,
    optimizer: Optimiser,
) -> Training:
    """Return a run of this process alone, ready for its first epoch."""
    stepping = optimizer(objective.parameters())
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


def _usual(optim: OptimConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return build_optimizer(optim, parameters)


def _unchanged(images: Tensor) -> Tensor:
    return images


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Give a model back what freezing it has changed."""
    training = [module for module in model.modules() if module.training]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad_(True)


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """Teacher and student with the levels that are matched."""

    teacher: NamedLevels
    student: NamedLevels

    @classmethod
    def of(cls, teacher: nn.Module, student: nn.Module, levels: Levels, images: Tensor) -> _Pair:
        """Return two models with levels as their owner names them, or with those that suit.

        Raises:
            ConfigError: there are none, or a model has no such module.
        """
        if levels is None:
            size = (images.shape[-2], images.shape[-1])
            of_student, of_teacher = (stage_modules(model, size) for model in (student, teacher))
            paired = pair_levels(
                feature_shapes(student, list(of_student), size),
                feature_shapes(teacher, list(of_teacher), size),
            )
            levels = {of_student[own]: of_teacher[other] for own, other in paired.items()}
        names = [] if isinstance(levels, str) else list(levels)
        if not names or not all(isinstance(name, str) for name in names):
            raise ConfigError(
                f"levels: {levels!r} must be paths of modules, such as ['layer1', 'layer2']"
            )
        pairs = levels if isinstance(levels, Mapping) else {path: path for path in levels}
        return cls(
            student=NamedLevels(student, list(pairs), "student"),
            teacher=NamedLevels(teacher, list(pairs.values()), "teacher"),
        )

    def shapes(
        self, images: Tensor
    ) -> tuple[dict[int, tuple[int, int, int]], dict[int, tuple[int, int, int]]]:
        """Return level -> (C, H, W) of the student and of the teacher, on some images.

        Raises:
            ConfigError: the output of a module is no feature map.
        """
        height, width = images.shape[-2:]
        return (
            self.student.learn_layouts(_outputs(self.student, images), (height, width)),
            self.teacher.learn_layouts(_outputs(self.teacher, images), (height, width)),
        )

    def tapped(self, levels: Sequence[int]) -> tuple[Teacher, FeatureTap]:
        """Return the frozen teacher and a tap of the student."""
        return self.listening(levels), FeatureTap(self.student, levels)

    def listening(self, levels: Sequence[int]) -> Teacher:
        """Return the frozen teacher, whose levels have the student's numbers."""
        return Teacher(self.teacher, {level: level for level in levels})


@torch.no_grad()
def _outputs(model: NamedLevels, images: Tensor) -> dict[int, Any]:
    """Return level -> its module's output; the model's batch statistics stay as they are."""
    with _as_it_was(model), FeatureTap(model, list(model.levels)) as tap:
        model.eval()
        return tap(images)[1]


def _graph(
    student_shapes: Mapping[int, tuple[int, int, int]],
    teacher_shapes: Mapping[int, tuple[int, int, int]],
    alpha: float,
    beta: float,
    gamma: float,
    temperature: float,
    dim: int | None,
) -> GraphDistillationLoss:
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
    )


def _logits(outputs: Any) -> Any:
    """Return a model's outputs, or their ``logits`` where they have those."""
    return getattr(outputs, "logits", outputs)


class _Objective(Objective):
    """The user's loss and the graph losses."""

    def __init__(self, student: nn.Module, loss: Loss, **parts: Any):
        super().__init__(student, **parts)
        self._loss = loss

    def forward(
        self, images_BCHW: Tensor, targets: Any, teacher: TeacherOutput | None
    ) -> tuple[dict[str, Tensor], Any]:
        outputs, features = self._tap(images_BCHW)
        terms = {"task": self._loss(_logits(outputs), targets)}
        return terms | self._distillation(features, teacher), None


class _Training(Training):
    """A run whose images are what the models take."""

    def to_device(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        return batch["image"].to(self.device), self.task.targets(batch, self.device)


class _Meter:
    """Counts images."""

    def __init__(self) -> None:
        self._images = 0

    def update(self, output: Any, batch: Mapping[str, Tensor]) -> None:
        self._images += len(batch["image"])

    def compute(self) -> dict[str, float]:
        return {"images": float(self._images)}

    def state_dict(self) -> dict[str, Tensor]:
        return {"images": torch.tensor(self._images)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._images = int(state["images"])


@dataclass(frozen=True)
class _Task:
    """The user's labels and metric."""

    lead_score: ClassVar[str] = "score"
    metric: Metric
    device: torch.device

    def targets(self, batch: Mapping[str, Tensor], device: torch.device) -> Any:
        return batch["label"].to(device)

    def is_blank(self, batch: Mapping[str, Tensor]) -> bool:
        return False

    def meter(self, device: torch.device) -> _Meter:
        return _Meter()

    @torch.no_grad()
    def score(
        self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], inputs: Any
    ) -> dict[str, Any]:
        outputs, labels = [], []
        for batch in batches:
            outputs.append(_logits(model(batch["image"].to(self.device))).cpu())
            labels.append(batch["label"].cpu())
        if not outputs:
            return {}
        return {"score": float(self.metric(torch.cat(outputs), torch.cat(labels)))}
