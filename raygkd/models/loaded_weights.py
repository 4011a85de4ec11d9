"""What is known of the weights that a model started from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

# licences that allow no commercial use, by a part of their names
NON_COMMERCIAL = ("-nc", "noncommercial", "non-commercial", "apple-amlr", "seer-license")


@dataclass(frozen=True, kw_only=True)
class LoadedWeights:
    """Weights that were loaded into a model.

    Attributes:
        source: name of the file, or the library's name of the weights.
        sha256: of the file.
        licence: as the library says; "" where it says none.
        new_layers: paths of the layers that keep their random weights, because the file is of
            another number of classes or has no such layer.
    """

    source: str
    sha256: str
    licence: str = ""
    new_layers: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether every layer has weights of the file, the last one too."""
        return not self.new_layers

    @property
    def forbids_commercial_use(self) -> bool:
        """Whether the licence allows no commercial use."""
        return any(part in self.licence.lower() for part in NON_COMMERCIAL)

    def to_mapping(self) -> dict[str, str]:
        """Return the facts as plain text, as model files and MLflow hold them."""
        return {**asdict(self), "new_layers": ", ".join(self.new_layers)}

    @classmethod
    def from_mapping(cls, known: Mapping[str, str]) -> LoadedWeights:
        """Return the weights described by the result of ``to_mapping``."""
        layers = tuple(name for name in known.get("new_layers", "").split(", ") if name)
        texts = {name: known.get(name, "") for name in ("source", "sha256", "licence")}
        return cls(**texts, new_layers=layers)

    def __str__(self) -> str:
        licence = f", licence {self.licence}" if self.licence else ""
        layers = ", ".join(self.new_layers)
        new = f"; {layers} starts at random for this number of classes" if layers else ""
        return f"{self.source} (sha256 {self.sha256[:16]}{licence}){new}"
