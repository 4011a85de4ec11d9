"""Every command as docs/reference/commands.md has it: ``python tests/cli/print_commands.py``."""

from __future__ import annotations

import inspect
import re

import click
from print_options import leaves

from raygkd.cli.main import commands


def sections() -> str:
    """Return a section for each command: usage, help, and the names of its options."""
    return "\n\n".join(_section(path, command) for path, command in sorted(leaves(commands, "")))


def _section(path: str, command: click.Command) -> str:
    context = click.Context(command, info_name=f"raygkd {path}")
    usage = " ".join(command.collect_usage_pieces(context))
    options = [
        f"`{max(param.opts, key=len)}`"
        for param in command.get_params(context)
        if isinstance(param, click.Option) and not param.hidden
    ]
    blocks = [f"### raygkd {path}", f"```\nraygkd {path} {usage}\n```", *_paragraphs(command)]
    return "\n\n".join([*blocks, f"Options: {', '.join(sorted(options))}."])


def _paragraphs(command: click.Command) -> list[str]:
    text = inspect.cleandoc(command.help or "").split("\f")[0]
    blocks = [block for block in text.split("\n\n") if block.strip()]
    return [_verbatim(block) if block.startswith("\b") else _prose(block) for block in blocks]


def _verbatim(block: str) -> str:
    lines = block.strip("\b\n").rstrip()
    return f"```\n{inspect.cleandoc(lines)}\n```"


def _prose(block: str) -> str:
    """Return a paragraph in one line, with options and paths as code."""
    return re.sub(r"(?<![\w`-])(--[a-z][a-z-]+)", r"`\1`", " ".join(block.split()))


if __name__ == "__main__":
    print(sections())
