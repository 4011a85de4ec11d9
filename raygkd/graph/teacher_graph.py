"""What the graph losses take of the teacher.

Shape letters: B batch, C channels, H height, W width, P side of a square matrix, d spectral
dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TeacherGraph:
    """What the losses of one level take of the teacher, at any temperature and dimension.

    Masks and adjacency are not held but follow from the maps: masks cost next to nothing, and an
    adjacency has the size of a basis at a fifth of its arithmetic.

    Attributes:
        maps_BCHW: on the grid of the comparison, centred where the loss centres.
        spectrum: what ``ChannelGraphs.spectrum`` gives of the maps, where it is known.
    """

    maps_BCHW: Tensor
    spectrum: tuple[Tensor, Tensor] | None = None

    def split(self, size: int) -> Iterator[TeacherGraph]:
        """Yield the graphs of so many samples each, in order; the last may have fewer."""
        maps = self.maps_BCHW.split(size)
        if self.spectrum is None:
            yield from map(TeacherGraph, maps)
            return
        spectra = zip(*(part.split(size) for part in self.spectrum), strict=True)
        for part_BCHW, (values_BP, basis_BPP) in zip(maps, spectra, strict=True):
            yield TeacherGraph(part_BCHW, (values_BP, basis_BPP))
