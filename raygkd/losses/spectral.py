"""Distances between spectral embeddings that do not depend on the choice of eigenvectors.

An embedding is a pair of eigenvalues (B, d) and vectors (B, C, d), as ``spectral_embedding``
returns it. Flipping a vector's sign, or rotating the vectors of a repeated eigenvalue, describes
the same embedding and does not change any distance. Only the student gets a gradient. All three
distances are [ours]; the paper (arXiv 2405.08547) mentions the alignment of spectral embeddings.

Shape letters: B batch, C channels, d spectral dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raygkd.graph import full_precision


@full_precision
def relative_to_teacher(error_B: Tensor, power_B: Tensor) -> Tensor:
    """Divide each sample's error by the teacher's power, which sets its scale.

    If that power is zero (at most eps^2), the result is 0 with no gradient.

    Args:
        error_B: squared errors (B,).
        power_B: squared magnitudes of the teacher's quantity (B,).

    Returns:
        (B,) relative errors.

    Source: [ours].
    """
    floor = torch.finfo(power_B.dtype).eps ** 2
    # "<=" is false for NaN, so that NaN is kept and noticed
    return (error_B / power_B.clamp_min(floor)).masked_fill(power_B <= floor, 0.0)


@full_precision
def residual_distance(image_BCd: Tensor, values_Bd: Tensor, vectors_BCd: Tensor) -> Tensor:
    """Return how far the teacher's eigenpairs are from being the student's.

    ``|S'_s U_t - U_t Lambda_t|_F^2 / |Lambda_t|_F^2`` per sample. It is zero exactly if they are
    eigenpairs of the student, and bounds the angle between the embeddings by Davis-Kahan. The
    student's graph need not be decomposed.

    Args:
        image_BCd: ``S'_s U_t`` (B, C, d), see ``raygkd.graph.ChannelGraphs.times``.
        values_Bd: the teacher's eigenvalues (B, d).
        vectors_BCd: the teacher's vectors U_t (B, C, d).

    Returns:
        (B,), 0 for a sample whose teacher has no spectrum (a complete graph).

    Source: [ours].
    """
    values_Bd, vectors_BCd = values_Bd.detach(), vectors_BCd.detach()
    error_B = (image_BCd - vectors_BCd * values_Bd[:, None, :]).square().sum((1, 2))
    return relative_to_teacher(error_B, values_Bd.square().sum(1))


@full_precision
def subspace_distance(
    student_values_Bd: Tensor,
    student_vectors_BCd: Tensor,
    teacher_values_Bd: Tensor,
    teacher_vectors_BCd: Tensor,
) -> Tensor:
    """Return ``|K_t - K_s|_F^2 / |Lambda_t|_F^2`` per sample, with ``K = U Lambda U^T``.

    It is computed from the (d, d) products of the vectors, not from the (C, C) matrices K.

    Args:
        student_values_Bd: the student's eigenvalues (B, d).
        student_vectors_BCd: the student's vectors (B, C, d).
        teacher_values_Bd: the teacher's eigenvalues (B, d).
        teacher_vectors_BCd: the teacher's vectors (B, C, d).

    Returns:
        (B,), 0 for a sample whose teacher has no spectrum (a complete graph).

    Source: [ours].
    """
    teacher_values_Bd = teacher_values_Bd.detach()
    overlap_Bdd = (teacher_vectors_BCd.detach().mT @ student_vectors_BCd).square()
    products_Bdd = teacher_values_Bd[:, :, None] * student_values_Bd[:, None, :]
    shared_B = (products_Bdd * overlap_Bdd).sum((1, 2))
    power_B = teacher_values_Bd.square().sum(1)
    # rounding can make the squared distance slightly negative
    error_B = (power_B + student_values_Bd.square().sum(1) - 2 * shared_B).clamp_min(0.0)
    return relative_to_teacher(error_B, power_B)


@full_precision
def procrustes_distance(
    student_values_Bd: Tensor,
    student_vectors_BCd: Tensor,
    teacher_values_Bd: Tensor,
    teacher_vectors_BCd: Tensor,
) -> Tensor:
    """Return the squared difference of ``E = U Lambda^1/2`` after the best alignment.

    ``min_Q |E_s - E_t Q|_F^2 / |E_t|_F^2`` over orthogonal Q, where the numerator is equal to
    ``|E_s|^2 + |E_t|^2 - 2 |E_t^T E_s|_*``. Dividing by the teacher's square keeps the distance
    comparable across widths; the mean squared difference alone would shrink like 1 / (C d). The
    best Q is ``P V^T``, from the singular value decomposition ``E_t^T E_s = P Sigma V^T``. By the
    envelope theorem, Q is treated as constant in the gradient, which is exact where it is defined,
    and finite where singular values repeat or vanish. Second derivatives ignore changes of Q.

    Args:
        student_values_Bd: the student's eigenvalues (B, d).
        student_vectors_BCd: the student's vectors (B, C, d).
        teacher_values_Bd: the teacher's eigenvalues (B, d).
        teacher_vectors_BCd: the teacher's vectors (B, C, d).

    Returns:
        (B,), 0 for a sample whose teacher has no spectrum (a complete graph).

    Source: [ours].
    """
    student_BCd = _scaled(student_values_Bd, student_vectors_BCd)
    teacher_BCd = _scaled(teacher_values_Bd, teacher_vectors_BCd).detach()
    with torch.no_grad():
        product_Bdd = teacher_BCd.mT @ student_BCd
        # LAPACK raises on NaN; the difference below passes it on to the loss
        left_Bdd, _, right_Bdd = torch.linalg.svd(product_Bdd.nan_to_num(0.0, 0.0, 0.0))
        alignment_Bdd = left_Bdd @ right_Bdd
    error_B = (student_BCd - teacher_BCd @ alignment_Bdd).square().sum((1, 2))
    return relative_to_teacher(error_B, teacher_BCd.square().sum((1, 2)))


def _scaled(values_Bd: Tensor, vectors_BCd: Tensor) -> Tensor:
    """Return ``U Lambda^1/2``, with a gradient of zero instead of infinity at eigenvalue 0."""
    zero_Bd = values_Bd <= 0
    roots_Bd = values_Bd.masked_fill(zero_Bd, 1.0).sqrt().masked_fill(zero_Bd, 0.0)
    return vectors_BCd * roots_Bd[:, None, :]
