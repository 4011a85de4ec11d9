"""Every option of every command as README's table has it: ``python tests/cli/print_options.py``."""

from __future__ import annotations

from collections.abc import Iterator

import click

from raygkd.cli.main import commands


def table() -> str:
    """Return the table: an option that several commands have alike is one row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for path, command in _leaves(commands, ""):
        context = click.Context(command, info_name=path, parent=click.Context(commands))
        for param in command.params:
            record = param.get_help_record(context)
            if isinstance(param, click.Option) and record is not None:
                rows.setdefault(record, []).append(path)
    lines = ["| option | of | |", "| --- | --- | --- |"]
    for (flags, text), paths in sorted(rows.items(), key=lambda row: row[0][0].lstrip("-")):
        lines.append(f"| `{_cell(flags)}` | {', '.join(paths)} | {_cell(text)} |")
    return "\n".join(lines)


def _leaves(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    """Yield path and command of all that is no group."""
    for name, command in group.commands.items():
        inner = f"{path} {name}".strip()
        if isinstance(command, click.Group):
            yield from _leaves(command, inner)
        else:
            yield inner, command


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(table())
