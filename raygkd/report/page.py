"""A report as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

_TEMPLATE = "page.html"


@dataclass(frozen=True)
class Words:
    """A paragraph.

    Attributes:
        text: plain; what would be HTML is shown as it is written.
        is_command: it is what a shell would be given.
    """

    text: str
    is_command: bool = False

    kind = "words"


@dataclass(frozen=True)
class Table:
    """Numbers side by side.

    Attributes:
        header: names of the columns.
        rows: a text for each column.
        texts: how many columns, from the first, hold words; the others hold numbers.
        note: a line below.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1
    note: str = ""

    kind = "table"


@dataclass(frozen=True)
class Picture:
    """A PNG with what it shows.

    Attributes:
        path: of the file.
        title: what it is, for whom cannot see it too.
        text: how it is read.
        is_wide: it holds many small parts, and stays larger on a narrow screen.
    """

    path: Path
    title: str
    text: str
    is_wide: bool = False

    kind = "picture"

    @property
    def uri(self) -> str:
        """The picture itself, as the address of an image."""
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode()


Block = Words | Table | Picture


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report.

    Attributes:
        anchor: its name in the page's addresses.
        title: its heading.
        blocks: what it holds, in order.
        numbers: what of it programs are told, as JSON has it.
    """

    anchor: str
    title: str
    blocks: Sequence[Block]
    numbers: Mapping[str, object] = field(default_factory=dict)

    @property
    def pictures(self) -> list[Picture]:
        """The pictures among the blocks."""
        return [block for block in self.blocks if isinstance(block, Picture)]


def page(title: str, subtitle: str, sections: Sequence[Section], left_out: Sequence[str]) -> str:
    """Return the HTML of a report, with its pictures inside.

    No script runs in it and nothing is fetched, whatever the texts hold: they are escaped, and the
    page forbids it to itself.

    Args:
        title: of the page.
        subtitle: a line below.
        sections: in order.
        left_out: a line for each section that there is none of, and why.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("raygkd.report").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(
        title=title, subtitle=subtitle, sections=sections, left_out=left_out
    )
