"""The teacher's input to the graph losses.

Shape letters: B batch, C channels, H height, W width, P side of a square matrix, d spectral
dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TeacherGraph:
    """The teacher's side of the losses of one level, for any temperature and dimension.

    Masks and adjacency are computed from the maps when needed: masks are cheap, and an adjacency
    is as large as an eigenbasis but takes a fifth of the arithmetic.

    Attributes:
        maps_BCHW: feature maps on the comparison grid, centred if the loss centres.
        spectrum: ``ChannelGraphs.spectrum`` of the maps, if already computed.
    """

    maps_BCHW: Tensor
    spectrum: tuple[Tensor, Tensor] | None = None

    def split(self, size: int) -> Iterator[TeacherGraph]:
        """Yield the graphs in parts of ``size`` samples, in order; the last part may be smaller."""
        maps = self.maps_BCHW.split(size)
        if self.spectrum is None:
            yield from map(TeacherGraph, maps)
            return
        spectra = zip(*(part.split(size) for part in self.spectrum), strict=True)
        for part_BCHW, (values_BP, basis_BPP) in zip(maps, spectra, strict=True):
            yield TeacherGraph(part_BCHW, (values_BP, basis_BPP))
