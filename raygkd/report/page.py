"""A report as a single self-contained HTML page."""

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
        text: plain text; HTML in it is escaped.
        is_command: show it as a shell command.
    """

    text: str
    is_command: bool = False

    kind = "words"


@dataclass(frozen=True)
class Table:
    """A table of numbers.

    Attributes:
        header: names of the columns.
        rows: a text for each column.
        texts: number of leading columns with words; the others have numbers.
        note: a line below the table.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1
    note: str = ""

    kind = "table"


@dataclass(frozen=True)
class Picture:
    """A PNG with its title and text.

    Attributes:
        path: of the file.
        title: also its alternative text.
        text: how to read it.
        is_wide: it has many small parts, and stays larger on narrow screens.
    """

    path: Path
    title: str
    text: str
    is_wide: bool = False

    kind = "picture"

    @property
    def uri(self) -> str:
        """The picture as a data URL."""
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode()


Block = Words | Table | Picture


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report.

    Attributes:
        anchor: its name in URLs of the page.
        title: its heading.
        blocks: its content, in order.
        numbers: its data for programs, as JSON.
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

    It runs no scripts and loads nothing, whatever the texts contain: they are escaped, and the
    page's content security policy forbids both.

    Args:
        title: of the page.
        subtitle: a line below the title.
        sections: in order.
        left_out: a line for each omitted section, with the reason.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("raygkd.report").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(
        title=title, subtitle=subtitle, sections=sections, left_out=left_out
    )
