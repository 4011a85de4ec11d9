"""Distillation without labels by a graph of samples and class proxies.

A class proxy is a vector that stands for a class in the space of embeddings: a row of a
classifier's last layer, or the embedding of a text.

[paper] (arXiv 2408.12248): the graphs of samples and class proxies of teacher and student, the
alignment of sample nodes, which hold embedding and logits, and of edges, which are correlations,
and learning from the teacher's classes without annotation. [ours]: the formulas and weights.

Shape letters: B batch, D entries of an embedding, K classes, R rows, N entries of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from raygkd.errors import ConfigError
from raygkd.graph import centred, full_precision, require, temperature_problem
from raygkd.losses.base import BaselineLoss, Setup
from raygkd.losses.levels import without_gradient
from raygkd.losses.logits import kd_loss
from raygkd.registry import METHODS, option

# smallest norm that a correlation divides by
SMALLEST_NORM = 1e-8


@full_precision
def node_loss(
    student_BD: Tensor, teacher_BD: Tensor, student_logits_BK: Tensor, teacher_logits_BK: Tensor
) -> Tensor:
    """Return ``mean_b (1 - cos(f_s, f_t)) + mean_b (1 - r(z_s, z_t))``.

    The first part compares embeddings f, the second logits z by their Pearson correlation r over
    the classes. Embeddings of zeros and logits without spread have no gradient.

    Args:
        student_BD: embeddings, already of the teacher's size.
        teacher_BD: embeddings; they get no gradient.
        student_logits_BK: class scores.
        teacher_logits_BK: class scores; they get no gradient.

    Returns:
        A scalar without unit, from 0 to 4.

    Source: Xu et al., arXiv 2408.12248, for what is aligned; the formula is [ours].
    """
    teacher_BD, teacher_logits_BK = map(without_gradient, (teacher_BD, teacher_logits_BK))
    cosines_B = F.cosine_similarity(student_BD, teacher_BD, eps=SMALLEST_NORM)
    return (1 - cosines_B).mean() + _unlikeness(student_logits_BK, teacher_logits_BK)


@full_precision
def edge_loss(
    student_BD: Tensor, student_KD: Tensor, teacher_BD: Tensor, teacher_KD: Tensor
) -> Tensor:
    """Return ``mean_b (1 - r(e_s, e_t))`` of the edges from samples to class proxies.

    The edge ``e_bk`` is the Pearson correlation of embedding b and proxy k over their entries, and
    r is that of a sample's edges in student and teacher. Student and teacher may have embeddings
    of different sizes. A shift or scale of all edges of a sample does not matter: images and texts
    lie in different parts of a teacher's space.

    Args:
        student_BD: embeddings (B, D_s).
        student_KD: class proxies (K, D_s).
        teacher_BD: embeddings (B, D_t); they get no gradient.
        teacher_KD: class proxies (K, D_t); they get no gradient.

    Returns:
        A scalar without unit, from 0 to 2.

    Source: Xu et al., arXiv 2408.12248, for what is aligned; the formula is [ours].
    """
    teacher_BD, teacher_KD = map(without_gradient, (teacher_BD, teacher_KD))
    return _unlikeness(_edges(student_BD, student_KD), _edges(teacher_BD, teacher_KD))


def _edges(samples_BD: Tensor, proxies_KD: Tensor) -> Tensor:
    """Return the correlations (B, K) of embeddings and class proxies over their entries."""
    sides = (
        F.normalize(_centred_rows(rows), eps=SMALLEST_NORM) for rows in (samples_BD, proxies_KD)
    )
    samples_BD, proxies_KD = sides
    return samples_BD @ proxies_KD.mT


def _unlikeness(student_RN: Tensor, teacher_RN: Tensor) -> Tensor:
    """Return ``1 - r`` of corresponding rows, averaged over the rows."""
    rows = _centred_rows(student_RN), _centred_rows(teacher_RN)
    return (1 - F.cosine_similarity(*rows, dim=1, eps=SMALLEST_NORM)).mean()


def _centred_rows(rows_RN: Tensor) -> Tensor:
    """Subtract each row's mean; a constant row becomes zero, and so does its gradient."""
    return centred(rows_RN[None, ..., None])[0, ..., 0]


@METHODS.register("prg")
class PRG(BaselineLoss):
    """Samples and class proxies as a graph, aligned without labels.

    The sum of ``kd_loss``, of ``node_loss`` and of ``edge_loss``. The student's embeddings go
    through a linear layer to the teacher's size, which is trained with it; its class proxies are
    the rows of its own last layer. Labels are not read, and their loss has weight 0.

    Args:
        setup: what it is built for; it needs the sizes of the embeddings.
        temperature: of the class probabilities in ``kd_loss``.
        node: weight of the nodes.
        edge: weight of the edges.

    Raises:
        ConfigError: the sizes are missing, or the temperature is not above 0.
    """

    task_weight = 0.0
    needs = (
        *("student_logits", "teacher_logits", "student_embeddings", "teacher_embeddings"),
        *("student_proxies", "teacher_proxies"),
    )
    source = "Xu et al., arXiv 2408.12248; formulas and weights are ours"

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of the loss."""

        temperature: float = option(
            1.0, "temperature of the class probabilities", above=0.0, search={"uniform": (1.0, 4.0)}
        )
        node: float = option(
            1.0, "weight of the sample nodes", minimum=0.0, search={"loguniform": (0.1, 10.0)}
        )
        edge: float = option(
            1.0,
            "weight of the edges from samples to classes",
            minimum=0.0,
            search={"loguniform": (0.1, 10.0)},
        )

    def __init__(self, setup: Setup, *, temperature: float, node: float, edge: float):
        super().__init__(setup)
        require(temperature_problem(temperature))
        if setup.embedding_sizes is None:
            raise ConfigError(f"{self.name} needs embedding_sizes, those of student and teacher")
        self.temperature, self.node, self.edge = temperature, node, edge
        # without a node loss it would have no gradient
        self.projection = nn.Linear(*setup.embedding_sizes) if node else None

    @full_precision
    def loss(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_embeddings: Tensor,
        teacher_embeddings: Tensor,
        student_proxies: Tensor,
        teacher_proxies: Tensor,
    ) -> Tensor:
        """Return the weighted sum of the three parts."""
        teacher_logits = without_gradient(teacher_logits)
        loss = kd_loss(student_logits, teacher_logits, self.temperature)
        require(
            _graph_problem("student", student_logits, student_embeddings, student_proxies),
            _graph_problem("teacher", teacher_logits, teacher_embeddings, teacher_proxies),
        )
        if self.projection is not None:
            projected_BD = self.projection(student_embeddings)
            nodes = node_loss(projected_BD, teacher_embeddings, student_logits, teacher_logits)
            loss = loss + self.node * nodes
        if self.edge:
            edges = edge_loss(
                student_embeddings, student_proxies, teacher_embeddings, teacher_proxies
            )
            loss = loss + self.edge * edges
        return loss


def _graph_problem(
    role: str, logits_BK: Tensor, embeddings_BD: Tensor, proxies_KD: Tensor
) -> str | None:
    """Return a problem if the shapes of a model's nodes do not fit together."""
    shapes = [tuple(tensor.shape) for tensor in (embeddings_BD, proxies_KD, logits_BK)]
    if all(len(shape) == 2 for shape in shapes):
        (images, size), (classes, other), scores = shapes
        if size == other and scores == (images, classes):
            return None
    return (
        f"the {role}'s embeddings, class proxies and logits must be (B, D), (K, D) and (B, K); "
        f"got {', '.join(map(str, shapes))}"
    )
