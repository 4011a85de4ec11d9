"""The code blocks of the documents, and how each block of commands is tested.

The line before such a block is one of two comments, which no page shows::

    <!-- run by tests/cli/test_quickstart.py -->
    <!-- not run: downloads weights -->
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from commands import FOREIGN

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
BLOCK = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(
    r"(?:\$ |\w+=\S+ )*(?:\S*/)?"
    r"(?:raygkd|python[\d.]*|pip|mlflow|ray|curl|npm|g\+\+|export|eval|sh|mkdocs) "
)


class Block(NamedTuple):
    """A code block, and the comment before it ("" without one)."""

    page: str
    line: int
    mark: str
    language: str
    code: str

    @property
    def is_command(self) -> bool:
        """Whether it holds commands or Python, not output, settings or a command's usage."""
        if self.language:
            return self.language in ("sh", "python")
        lines = self.code.splitlines()
        return any(COMMAND.match(line) and " [OPTIONS]" not in line for line in lines)


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page in their order."""
    text = page.read_text()
    name = str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name
    return [
        Block(name, text.count("\n", 0, found.start()) + 1, found[1] or "", found[2], found[3])
        for found in BLOCK.finditer(text)
    ]


def run_by(test: str, page: str) -> list[Block]:
    """Return the blocks of a page that a test runs, by the path of each in the repository."""
    return [block for block in blocks(ROOT / page) if block.mark == f"run by {test}"]


def pages_run_by(test: str) -> list[str]:
    """Return the pages that have blocks for a test."""
    names = [str(page.relative_to(ROOT)) for page in PAGES]
    return [name for name in names if run_by(test, name)]


def fault(block: Block) -> str | None:
    """Return what is wrong with the mark of a block of commands."""
    kind, _, rest = block.mark.partition("run by ")
    if block.mark.startswith("not run: ") and len(block.mark.split()) > 3:
        return None
    if kind or not rest:
        return "needs '<!-- run by TEST -->' or '<!-- not run: REASON -->' on the line before it"
    test = ROOT / rest
    if not test.is_file():
        return f"{rest} does not exist"
    text, lines = test.read_text(), block.code.splitlines()
    reads = "pages_run_by(" in text or f'{Path(block.page).name}"' in text
    if not reads and not all(line in text for line in lines):
        return f"{rest} does not read the page, and lacks these commands"
    return None


def faults(pages: list[Path]) -> Iterator[str]:
    """Yield what is wrong with the marks of pages."""
    for page in pages:
        for block in blocks(page):
            if block.is_command and (found := fault(block)):
                yield f"{block.page}:{block.line}: {found}"


def run_block(block: Block, folder: Path) -> str:
    """Run a block as it stands, in a folder and without the settings of others; return its output.

    A shell stops at the first command that fails.
    """
    environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    environment["PATH"] = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    python = block.language == "python"
    # behind a prompt, with what the commands print
    typed = re.findall(r"^\$ (.*)", block.code, re.MULTILINE)
    code = "\n".join(typed) or block.code
    command = [sys.executable, "-c", code] if python else ["bash", "-ec", code]
    ran = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert ran.returncode == 0, f"{block.code}\n{ran.stdout}{ran.stderr}"
    return ran.stdout
