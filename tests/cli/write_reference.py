"""Write the generated parts of docs/reference: ``python tests/cli/write_reference.py``.

A part stands between two comments in its page, such as ``<!-- options -->`` and ``<!-- end of
options -->``.
"""

from __future__ import annotations

import re
from pathlib import Path

from print_commands import sections
from print_options import dotted_settings, table

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
# name of a part -> its page, and what makes it
PARTS = {
    "options": ("configuration.md", table),
    "settings": ("configuration.md", dotted_settings),
    "commands": ("commands.md", sections),
}


def shown(part: str) -> str:
    """Return a part as its page has it."""
    [text] = re.findall(_between(part), (REFERENCE / PARTS[part][0]).read_text(), re.DOTALL)
    return str(text)


def write() -> None:
    """Write every part into its page."""
    for part, (name, make) in PARTS.items():
        page = REFERENCE / name
        new = f"<!-- {part} -->\n{make()}\n<!-- end of {part} -->"
        page.write_text(
            re.sub(_between(part), lambda _, new=new: new, page.read_text(), flags=re.S)
        )


def _between(part: str) -> str:
    return f"<!-- {part} -->\n(.*?)\n<!-- end of {part} -->"


if __name__ == "__main__":
    write()
