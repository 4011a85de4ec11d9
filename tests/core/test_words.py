"""Docstrings, comments, help texts, messages and documents use the field's words.

A turn is listed only if it is wrong in every context. Each has an example, which the pattern must
find, and its plain form.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import raygkd

PACKAGE = Path(raygkd.__file__).parent
ROOT = PACKAGE.parent
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")),
)

# pattern -> an example, and what to write instead
BANNED = {
    r"\bbroken off\b": ("a run that was broken off goes on", "interrupted"),
    r"\b(is|are|was|were) told\b(?! (apart|its|to)\b)": (
        "an image that cannot be read is told",
        "is reported",
    ),
    r"\btell(s|ing)? the user\b": ("tells the user that", "reports"),
    r"\bteacher (says|said|tells|told)\b": ("what the teacher says of images", "teacher's outputs"),
    r"\bmodel says\b": ("what a model says of an image", "the model's predictions"),
    r"\bno matter of\b": ("it is no matter of its teacher's", "does not apply to"),
    r"\bnothing to say\b": ("its heads have nothing to say", "is not used"),
    r"\bbeg(i|u)ns? anew\b": ("a copy begins anew", "restarts"),
    r"\bis held to\b": ("the control that its student is held to", "is compared with"),
    r"\b(has|have) been asked for again\b": ("it has been asked for again", "repeated"),
    r"\bworked out\b": ("the terms were worked out since", "computed"),
    r"\bgoes on (after|from|with)\b": ("a trial goes on after its last epoch", "is resumed"),
    r"\bgo on from what\b": ("go on from what it gave", "continue from"),
    r"\bwhat ``[^`]+`` (gave|gives)\b": ("what ``state_dict`` gave", "the result of"),
    r"\bDo what \S+ does\b": ("Do what ``quantise`` does", "call"),
    r"\bRefuse what\b": ("Refuse what needs packages", "check that"),
    r"\bone a line\b": ("a list of names, one a line", "one per line"),
    r"(?<!there )\b(is|are|was) no (?!(longer|more|better|worse|different)\b)": (
        "the file is no text",
        "is not a",
    ),
    r"\b(supported|expected) (is|are) (a|one|only|fractions|pixels)\b": (
        "supported is one label per image",
        "only ... is supported",
    ),
    r"\bfiles? of weights\b": ("give a file of weights", "weights file"),
    r"\bgive another\b": ("the folder is not empty: give another", "choose another"),
    r"\banybody's\b": ("a training loop of anybody's", "your own"),
    r"\b(maps|frames|weights|logits) alone (is|are)\b": (
        "its feature maps alone are used",
        "only its feature maps are",
    ),
}


def passages(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text: a document as it stands, a module's strings and comments.

    Lines of a docstring, and of comments that follow each other, are joined.
    """
    text = path.read_text()
    if path.suffix != ".py":
        yield 1, text
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    comments: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            line, words = token.start[0], token.string.lstrip("# ")
            if comments and comments[-1][0] == line - 1:
                words = f"{comments.pop()[1]} {words}"
            comments.append((line, words))
    yield from comments


def found(pattern: str, text: str) -> str | None:
    """Return the first words of a text that a pattern finds, wherever lines break."""
    match = re.search(pattern, " ".join(text.split()), re.IGNORECASE)
    return match[0] if match else None


@pytest.mark.parametrize("pattern", BANNED)
def test_each_turn_is_found_in_its_example(pattern: str) -> None:
    example, plain = BANNED[pattern]
    assert found(pattern, example.replace(" ", "\n    "))
    assert not found(pattern, plain)


def test_comments_over_two_lines_are_one_passage(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('"""A run."""\n# a run that was broken\n# off is resumed\nx = "so"\n')
    assert [text for _, text in passages(module)] == [
        "A run.",
        "so",
        "a run that was broken off is resumed",
    ]


@pytest.mark.parametrize("name", [*DOCUMENTS, "raygkd"])
def test_texts_are_plain(name: str) -> None:
    paths = sorted(PACKAGE.rglob("*.py")) if name == "raygkd" else [ROOT / name]
    turns = [
        f"{path.relative_to(ROOT)}:{line}: {turn!r}, write: {plain}"
        for path in paths
        for line, text in passages(path)
        for pattern, (_, plain) in BANNED.items()
        if (turn := found(pattern, text))
    ]
    assert turns == [], "\n".join(turns)
