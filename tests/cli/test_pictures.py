"""The pictures of the documents, and what makes them and their pages."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
from test_docs import check_command

DOCS = Path(__file__).parents[2] / "docs"
IMAGES = DOCS / "images"
LARGEST = 200_000

pytestmark = pytest.mark.unit


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(IMAGES))
    return importlib.import_module("record")


@pytest.fixture
def make(record: ModuleType) -> ModuleType:
    return importlib.import_module("make")


def test_every_picture_is_shown_small_and_can_be_made_again(make: ModuleType) -> None:
    pages = (*DOCS.rglob("*.md"), DOCS.parent / "README.md")
    text = "".join(page.read_text() for page in pages)
    pictures = [path for path in IMAGES.iterdir() if path.suffix in (".svg", ".png")]
    drawn_by_hand = {"overview"}
    assert {path.stem for path in pictures} <= {*make.PICTURES, *drawn_by_hand}
    for path in pictures:
        assert re.search(rf"!\[[^]]{{30,}}\]\([./\w]*images/{path.name}\)", text), path.name
        assert path.stat().st_size < LARGEST, path.name


def test_the_commands_of_pictures_are_those_of_the_pages(make: ModuleType) -> None:
    pages = "".join(page.read_text() for page in DOCS.rglob("*.md"))
    commands = [value for name, value in vars(make).items() if name.isupper()]
    commands = [value for value in commands if isinstance(value, str) and " --" in value]
    assert len(commands) >= 3
    for command in commands:
        check_command(command.split())
        assert f"\nraygkd {command}" in pages, command


def test_a_screen_shows_what_a_terminal_shows(record: ModuleType) -> None:
    screen = record.Screen()
    screen.write("$ run\r\n\x1b[?25lstep \x1b[31m1\x1b[0m of 2\r\x1b[2Kstep 2 of")
    screen.write(" 2\r\n\x1b[1A\x1b[2")
    screen.write("K\x1b[1mdone\x1b[0m\r\n")
    bold = "".join(f"\x1b[1m{letter}\x1b[0m" for letter in "done")
    assert screen.shown() == ["$ run", bold]
    screen.write("x" * (record.COLUMNS + 1))
    assert screen.shown()[2:] == ["x" * record.COLUMNS, "x"]
    screen.write("\n" * record.ROWS + "end")
    assert len(screen.shown()) == record.ROWS
    assert screen.shown()[-1].strip() == "end"


def test_a_recording_plays_and_stays_at_its_end(record: ModuleType, tmp_path: Path) -> None:
    program = "for n in 1 2 3; do printf '\\r%s <of> 3' $n; sleep 0.2; done"
    record.record(["sh", "-c", program], tmp_path, tmp_path / "picture.svg")
    lines = (tmp_path / "picture.svg").read_text().splitlines()
    [first] = [line for line in lines if "1 &lt;of&gt; 3" in line]
    [last] = [line for line in lines if "3 &lt;of&gt; 3" in line]
    assert first.startswith('<g visibility="hidden"><set attributeName="visibility" to="visible"')
    assert last.startswith('<g><set attributeName="visibility" to="hidden" begin="0s"')


def test_options_do_not_break_in_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    page = importlib.import_module("whole_words").on_page_content
    whole = '<span class="whole">--a-b</span>'
    assert page("<code>--a-b 1</code> --a-b") == f"<code>{whole} 1</code> --a-b"
    sh = '<div class="language-sh highlight"><pre><span></span><code>x --a-b=1</code></pre></div>'
    assert page(sh) == sh.replace("--a-b", whole)
    other = sh.replace("-sh", "-text")
    assert page(other) == other
    long = f"<code>{'a-' * 20}</code>"
    assert page(long) == long
