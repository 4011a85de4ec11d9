"""Every option and dotted setting, as tables: ``python tests/cli/print_options.py``."""

from __future__ import annotations

from collections.abc import Iterator

import click

from raygkd.cli.main import commands
from raygkd.config.schema import registered_settings


def table() -> str:
    """Return the table: an option that several commands have alike is one row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for path, command in leaves(commands, ""):
        context = click.Context(command, info_name=path, parent=click.Context(commands))
        for param in command.params:
            record = param.get_help_record(context)
            if isinstance(param, click.Option) and record is not None:
                rows.setdefault(record, []).append(path)
    lines = ["| option | of | |", "| --- | --- | --- |"]
    for (flags, text), paths in sorted(rows.items(), key=lambda row: row[0][0].lstrip("-")):
        lines.append(f"| `{_cell(flags)}` | {', '.join(paths)} | {_cell(text)} |")
    return "\n".join(lines)


def dotted_settings() -> str:
    """Return the table of the settings that belong to one method or data set."""
    lines = ["| setting | | default |", "| --- | --- | --- |"]
    for name, (_, leaf, _) in registered_settings().items():
        text, _, given = leaf.metadata["help"].partition(" [default: ")
        many = isinstance(leaf.default, tuple)
        default = given.rstrip("]") or (",".join(leaf.default) if many else leaf.default)
        lines.append(f"| `{name}` | {_cell(text)} | {_cell(str(default))} |")
    return "\n".join(lines)


def leaves(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    """Yield path and command of all that is not a group."""
    for name, command in group.commands.items():
        inner = f"{path} {name}".strip()
        if isinstance(command, click.Group):
            yield from leaves(command, inner)
        else:
            yield inner, command


def _cell(text: str) -> str:
    # two brackets side by side would be a link in Markdown
    return " ".join(text.split()).replace("|", "\\|").replace("] [", "; ")


if __name__ == "__main__":
    print(table(), dotted_settings(), sep="\n\n")
