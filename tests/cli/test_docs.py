"""The documents: links resolve, commands are right, and blocks are run or say why not."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from shown_blocks import PAGES, ROOT, Block, blocks, fault, faults, run_by

from raygkd.cli.main import commands as raygkd

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LINK = re.compile(r"!?\[(?:[^\]`]|`[^`]*`)*\]\(([^)\s]+)\)")


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


def shown_commands(name: str) -> Iterator[list[str]]:
    """Yield the arguments of each raygkd command in a page's code blocks."""
    for block in blocks(ROOT / name):
        for line in block.code.replace("\\\n", " ").splitlines():
            shown = line.removeprefix("$ ").rpartition("&& .venv/bin/")[2]
            if shown.startswith("raygkd ") and " [OPTIONS]" not in line:
                yield shlex.split(shown)[1:]


@pytest.mark.unit
@pytest.mark.parametrize("name", NAMES)
def test_commands_can_be_run_as_they_are_shown(name: str) -> None:
    for arguments in shown_commands(name):
        check_command(arguments)


def check_command(arguments: list[str]) -> None:
    """Raise UsageError if a command, an option or its value does not exist, or one is missing."""
    command: click.Command = raygkd
    context = click.Context(raygkd, info_name="raygkd")
    rest = list(arguments)
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None, arguments
        command, context = found, click.Context(found, info_name=name, parent=context)
    # what submit sends is a command itself
    if command.name == "submit":
        check_command([word for word in rest if word != "--"])
    # checks names, values and what is required, and runs nothing
    command.make_context(command.name, rest, parent=context.parent)


@pytest.mark.unit
@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "tune --nonsense",
        "submit -- tune --nonsense",
        "tune --method nonsense",
        "tune --trials many",
        "export model.pt --format onnx",
        "export model.pt --format nonsense --out file",
        "predict model.pt",
        "jobs logs",
        "bench nonsense",
    ],
)
def test_a_mistake_in_a_command_is_found(line: str) -> None:
    with pytest.raises(click.UsageError):
        check_command(line.split())


@pytest.mark.unit
@pytest.mark.parametrize("name", NAMES)
def test_examples_in_python_can_be_read(name: str) -> None:
    for block in blocks(ROOT / name):
        if block.language == "python":
            ast.parse(block.code)


@pytest.mark.unit
def test_examples_of_losses_run() -> None:
    examples = run_by("tests/cli/test_docs.py", "docs/guides/python.md")
    assert len(examples) == 2
    for example in examples:
        exec(compile(example.code, "guide", "exec", dont_inherit=True), {})


@pytest.mark.unit
def test_every_block_of_commands_is_run_or_says_why_not() -> None:
    assert list(faults(PAGES)) == []


@pytest.mark.unit
@pytest.mark.parametrize(
    ("mark", "wrong"),
    [
        ("", "needs '<!-- run by"),
        ("not run:", "needs '<!-- run by"),
        ("not run: no", "needs '<!-- run by"),
        ("run by tests/cli/test_nowhere.py", "does not exist"),
        ("run by tests/core/test_words.py", "does not read the page"),
    ],
)
def test_a_block_that_is_not_tested_is_found(mark: str, wrong: str) -> None:
    for code, language in (("raygkd tune\n", ""), ("x = 1\n", "python"), ("make\n", "sh")):
        block = Block("docs/new.md", 1, mark, language, code)
        assert block.is_command
        assert wrong in (fault(block) or "")
    assert not Block("docs/new.md", 1, mark, "", "raygkd tune [OPTIONS]\n").is_command
    assert not Block("docs/new.md", 1, mark, "", "raygkd-digits on 359 images\n").is_command


@pytest.mark.unit
def test_a_mark_belongs_to_the_block_after_it(tmp_path: Path) -> None:
    page = "x\n\n<!-- not run: needs a GPU -->\n```\nraygkd tune\n```\n\n```\nraygkd ui\n```\n"
    (tmp_path / "page.md").write_text(page)
    found = blocks(tmp_path / "page.md")
    assert [block.mark for block in found] == ["not run: needs a GPU", ""]
