"""How alike the features of two models are: linear CKA, from sums over images.

Shapes: N images, D and E features of the two models.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class LinearCKA:
    """Debiased linear centred kernel alignment of two models' features, exact over batches.

    It is 1 where the features are the same up to rotation and scale, and about 0 where they have
    nothing in common, for few images and many features too. It follows from sums over images, so
    that batches and ranks only add up.

    Source: Kornblith et al., arXiv 1905.00414, with the unbiased estimator of HSIC of Song et al.
    (JMLR 2012, eq. 5).

    Args:
        features: D and E.
        device: of the sums; that of the features saves copies.
    """

    def __init__(self, features: tuple[int, int], device: torch.device | str = "cpu"):
        first, second = features
        size = first + second
        # of x and y side by side: x x', x y', y y' in one; then sums of x and y, the same weighted
        # by |x|^2 and by |y|^2, and 1, |x|^2, |y|^2, |x|^4, |y|^4, |x|^2 |y|^2
        self._first = first
        self._products = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._weighted = torch.zeros(3, size, dtype=torch.float64, device=device)
        self._scalars = torch.zeros(6, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, first_ND: Tensor, second_NE: Tensor) -> None:
        """Add the features of a batch, (N, D) and (N, E)."""
        first_ND, second_NE = first_ND.double(), second_NE.double()
        both_NF = torch.cat([first_ND, second_NE], dim=1)
        x_N, y_N = first_ND.square().sum(1), second_NE.square().sum(1)
        ones_N = torch.ones_like(x_N)
        self._products += both_NF.T @ both_NF
        self._weighted += torch.stack([ones_N, x_N, y_N]) @ both_NF
        terms = (ones_N, x_N, y_N, x_N * x_N, y_N * y_N, x_N * y_N)
        self._scalars += torch.stack([term_N.sum() for term_N in terms])

    def reduce(self, all_sum: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by those of all ranks; once, after the last batch."""
        self._products = all_sum(self._products)
        self._weighted = all_sum(self._weighted)
        self._scalars = all_sum(self._scalars)

    def compute(self) -> float:
        """Return the alignment, 0 to 1; 0 where the features of a model are all alike, or broken.

        Raises:
            ValueError: fewer than 4 images were added.
        """
        if self._scalars[0] < 4:
            raise ValueError("CKA needs at least 4 images")
        among = self._hsic(0, 1)
        scale = self._hsic(0, 0) * self._hsic(1, 1)
        found = among / scale**0.5 if scale > 0 else 0.0
        return min(1.0, max(0.0, found)) if found == found else 0.0

    def _hsic(self, one: int, other: int) -> float:
        """Return the unbiased HSIC of the features of two models, 0 and 1, each with itself too.

        With K and L the Gram matrices without their diagonals, it is (tr KL + 1'K1 1'L1 / (n - 1)
        (n - 2) - 2 / (n - 2) 1'KL1) / n (n - 3).
        """
        count, x, y, xx, yy, xy = self._scalars.tolist()
        own = (slice(0, self._first), slice(self._first, None))
        diagonals, squares = (x, y), ((xx, xy), (xy, yy))
        sums = [self._weighted[0, own[model]] for model in (one, other)]
        products = self._products[own[one], own[other]]
        # of each model the features weighted by the other's diagonal, times the sum of all
        crossed = sum(
            float(self._weighted[1 + weight, own[model]] @ sums[place])
            for place, (model, weight) in enumerate([(one, other), (other, one)])
        )
        trace = float(products.square().sum()) - squares[one][other]
        totals = [
            float(sums[place] @ sums[place]) - diagonals[model]
            for place, model in enumerate((one, other))
        ]
        row_sums = float(sums[0] @ products @ sums[1]) - crossed + squares[one][other]
        unbiased = trace + totals[0] * totals[1] / ((count - 1) * (count - 2))
        return (unbiased - 2 * row_sums / (count - 2)) / (count * (count - 3))
