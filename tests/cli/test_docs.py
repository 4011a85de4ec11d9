"""The documents: links resolve, commands have the options that they use, and examples run."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from raygkd.cli.main import commands as raygkd

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LINK = re.compile(r"!?\[(?:[^\]`]|`[^`]*`)*\]\(([^)\s]+)\)")
# examples that need no trained models
SELF_CONTAINED = "import torch\nfrom raygkd.losses import"


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a language; of any, if it is "any"."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [code for kind, code in found if language in ("any", kind)]


def prose(text: str) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as repository pages and MkDocs make them."""
    titles = re.findall(r"^#+ (.+)$", prose(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.unit
@pytest.mark.parametrize("name", NAMES)
def test_links_resolve(name: str) -> None:
    page = ROOT / name
    broken = []
    for target in LINK.findall(prose(page.read_text())):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.is_file() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert broken == []


@pytest.mark.unit
def test_pages_of_the_site_link_to_each_other_only() -> None:
    docs = ROOT / "docs"
    for page in docs.glob("**/*.md"):
        for target in LINK.findall(prose(page.read_text())):
            if not re.match(r"\w+:|#", target):
                linked = (page.parent / target.partition("#")[0]).resolve()
                assert linked.is_relative_to(docs), (page.name, target)


def shown_commands(text: str) -> Iterator[list[str]]:
    """Yield the arguments of each raygkd command in a page's code blocks."""
    for block in blocks(text, "any"):
        for line in block.replace("\\\n", " ").splitlines():
            shown = line.removeprefix("$ ").rpartition("&& .venv/bin/")[2]
            if shown.startswith("raygkd "):
                yield shlex.split(shown)[1:]


@pytest.mark.unit
@pytest.mark.parametrize("name", NAMES)
def test_commands_have_the_options_that_are_shown(name: str) -> None:
    for arguments in shown_commands((ROOT / name).read_text()):
        check_command(arguments)


def check_command(arguments: list[str]) -> None:
    """Raise UsageError if a command, or one of its options, does not exist."""
    command: click.Command = raygkd
    context = click.Context(raygkd, info_name="raygkd")
    rest = list(arguments)
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None, arguments
        command, context = found, click.Context(found, info_name=name, parent=context)
    if rest and rest[0] == "[OPTIONS]":
        return
    # what submit sends is a command itself
    if "--" in rest:
        check_command(rest[rest.index("--") + 1 :])
        rest = rest[: rest.index("--")]
    command.make_parser(context).parse_args(rest)


@pytest.mark.unit
def test_a_wrong_option_is_found() -> None:
    with pytest.raises(click.NoSuchOption):
        check_command(["submit", "--", "tune", "--nonsense"])
    with pytest.raises(click.UsageError):
        check_command(["nonsense"])


@pytest.mark.unit
@pytest.mark.parametrize("name", NAMES)
def test_examples_in_python_can_be_read(name: str) -> None:
    for code in blocks((ROOT / name).read_text(), "python"):
        ast.parse(code)


@pytest.mark.unit
def test_examples_of_losses_run() -> None:
    guide = (ROOT / "docs" / "guides" / "python.md").read_text()
    examples = [code for code in blocks(guide, "python") if code.startswith(SELF_CONTAINED)]
    assert len(examples) == 2
    for code in examples:
        exec(compile(code, "guide", "exec", dont_inherit=True), {})
