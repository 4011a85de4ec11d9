"""Record a command in a terminal, and play it in an SVG."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from rich.style import Style
from rich.terminal_theme import TerminalTheme
from rich.text import Text

COLUMNS, ROWS = 110, 36
# the picture plays for so many seconds, in so many steps, however long the command took
SECONDS, STEPS = 12.0, 40
# in pixels
FONT, CHARACTER, LINE, EDGE, BAR = 13, 7.8, 18, 16, 30
THEME = TerminalTheme(
    (27, 33, 36),
    (222, 226, 222),
    [
        *((60, 66, 70), (230, 110, 100), (120, 190, 120), (215, 180, 90)),
        *((110, 160, 220), (190, 140, 200), (90, 180, 180), (200, 205, 200)),
    ],
)
OUTPUT = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)|\x1b")
INCOMPLETE = re.compile(r"\x1b(\[[?\d;]*)?$")

# rows of the screen, each with its colours as control sequences
Rows = list[str]


class Screen:
    """What a terminal shows: lines of characters with their colours, and a cursor.

    It knows what progress bars use: carriage return, cursor up, erase line, and colours.
    """

    def __init__(self) -> None:
        self._lines: list[list[str]] = [[]]
        self._row = self._column = 0
        self._colour = self._rest = ""

    def write(self, text: str) -> None:
        """Show the output of a program."""
        text = self._rest + text
        rest = INCOMPLETE.search(text)
        self._rest = rest[0] if rest else ""
        for codes, action, move, words in OUTPUT.findall(text.removesuffix(self._rest)):
            if move == "\r":
                self._column = 0
            elif move == "\n":
                self._next_line()
            elif action == "A":
                self._row = max(0, self._row - int(codes or 1))
            elif action == "K":
                kept = 0 if codes == "2" else self._column
                del self._lines[self._row][kept:]
            elif action == "m":
                self._colour = "" if codes in ("", "0") else f"{self._colour}\x1b[{codes}m"
            for letter in words:
                self._put(letter)

    def _next_line(self) -> None:
        self._row, self._column = self._row + 1, 0
        if self._row == len(self._lines):
            self._lines.append([])

    def _put(self, letter: str) -> None:
        if self._column == COLUMNS:
            self._next_line()
        line = self._lines[self._row]
        line += [" "] * (self._column + 1 - len(line))
        line[self._column] = f"{self._colour}{letter}\x1b[0m" if self._colour else letter
        self._column += 1

    def shown(self) -> Rows:
        """Return the last lines, as many as there is room for."""
        rows = ["".join(line).rstrip() for line in self._lines]
        while rows and not rows[-1]:
            rows.pop()
        return rows[-ROWS:]


def record(command: Sequence[str], folder: Path, picture: Path) -> None:
    """Run a command in a folder, in a terminal of its own; write what it shows as an SVG.

    Args:
        command: program and arguments.
        folder: where it runs.
        picture: SVG to write. It plays once; where it cannot, it shows the end.

    Raises:
        CalledProcessError: the command failed.
    """
    screen = Screen()
    screen.write(f"$ {shlex.join(command)}\n")
    frames = [(0.0, screen.shown())]
    started = time.monotonic()
    for text in _output(command, folder):
        screen.write(text)
        frames.append((time.monotonic() - started, screen.shown()))
    picture.write_text(svg(steps(frames), f"Recording of {shlex.join(command)}"))


def _output(command: Sequence[str], folder: Path) -> Iterator[str]:
    """Yield what a command writes to its terminal."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "TERM": "xterm-256color"}
    process = subprocess.Popen(
        command, stdin=its, stdout=its, stderr=its, cwd=folder, env=environment
    )
    os.close(its)
    decoder = codecs.getincrementaldecoder("utf-8")()
    while True:
        try:
            yield decoder.decode(os.read(ours, 1 << 16))
        except OSError:  # the command has ended and closed the terminal
            break
    os.close(ours)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command)


def steps(frames: Sequence[tuple[float, Rows]]) -> list[Rows]:
    """Return what was shown at times that are equally far apart, and the end."""
    total, found = frames[-1][0], []
    for step in range(STEPS):
        found.append([rows for seconds, rows in frames if seconds <= step * total / STEPS][-1])
    return [*found, frames[-1][1]]


def svg(screens: Sequence[Rows], title: str) -> str:
    """Return a picture that shows screens one after the other, and stays at the last."""
    high = max(map(len, screens))
    width, height = round(COLUMNS * CHARACTER + 2 * EDGE), BAR + high * LINE + EDGE
    dots = "".join(f'<circle cx="{EDGE + 16 * n}" cy="16" r="5"/>' for n in range(3))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}">',
        f'<rect width="{width}" height="{height}" rx="8" fill="{THEME.background_color.hex}"/>',
        f'<g fill="#59636a">{dots}</g>',
        f'<g font-family="Consolas, Menlo, DejaVu Sans Mono, monospace" font-size="{FONT}" '
        f'fill="{THEME.foreground_color.hex}" xml:space="preserve">',
    ]
    for number in range(high):
        texts = [rows[number] if number < len(rows) else "" for rows in screens]
        first = 0
        for last in range(len(texts)):
            if last + 1 < len(texts) and texts[last + 1] == texts[first]:
                continue
            if texts[first]:
                parts.append(_line(number, texts[first], first, last + 1, len(texts)))
            first = last + 1
    return "\n".join([*parts, "</g>", "</svg>"]) + "\n"


def _line(number: int, text: str, first: int, end: int, screens: int) -> str:
    """Return a line of the picture that is shown from a screen to another one."""
    y = BAR + LINE * number + FONT
    shown = "".join(_words(text, y))
    begin, finish = (f"{SECONDS * step / (screens - 1):.2f}s" for step in (first, end))
    if end < screens:
        playing = f'<set attributeName="visibility" to="visible" begin="{begin}" end="{finish}"/>'
        return f'<g visibility="hidden">{playing}{shown}</g>'
    # what is there at the end is hidden until its time
    playing = f'<set attributeName="visibility" to="hidden" begin="0s" end="{begin}"/>'
    return f"<g>{playing if first else ''}{shown}</g>"


def _words(text: str, y: int) -> Iterator[str]:
    """Yield the parts of a line that have one colour, each at its place."""
    rich = Text.from_ansi(text)
    styles: list[Style] = [Style()] * len(rich.plain)
    for span in rich.spans:
        if isinstance(span.style, Style):
            styles[span.start : span.end] = [
                style + span.style for style in styles[span.start : span.end]
            ]
    place = 0
    for found in re.finditer(r"\S+(?: \S+)*", rich.plain):
        place = found.start()
        while place < found.end():
            end = place
            while end < found.end() and styles[end] == styles[place]:
                end += 1
            yield _part(rich.plain[place:end], styles[place], place, y)
            place = end


def _part(words: str, style: Style, place: int, y: int) -> str:
    marks = ' font-weight="bold"' if style.bold else ""
    marks += ' font-style="italic"' if style.italic else ""
    marks += ' opacity="0.6"' if style.dim else ""
    if style.color is not None and not style.color.is_default:
        marks += f' fill="{style.color.get_truecolor(THEME).hex}"'
    x, width = EDGE + CHARACTER * place, CHARACTER * len(words)
    return f'<text x="{x:.1f}" y="{y}" textLength="{width:.1f}"{marks}>{escape(words)}</text>'
