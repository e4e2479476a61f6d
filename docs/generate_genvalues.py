"""docs/genvalues.md, from the commands themselves: `make docs`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click

from generate_values import anchor, code, table
from genvalues.cli import EXIT_STATUS, genvalues
from genvalues.commands import IN_PODS

REFERENCE = Path(__file__).parents[1] / "docs/genvalues.md"

INTRODUCTION = """\
# The command genvalues

Every command, with its options and an example. Written by `make docs` from the commands' own `--help`: change that, not
this page.
"""
COMPLETION = """\
## Shell completion

In `~/.bashrc`, `~/.zshrc` or `~/.config/fish/completions/genvalues.fish`:

    eval "$(_GENVALUES_COMPLETE=bash_source genvalues)"
    eval "$(_GENVALUES_COMPLETE=zsh_source genvalues)"
    _GENVALUES_COMPLETE=fish_source genvalues | source
"""


def commands(group: click.Group, context: click.Context) -> Iterator[tuple[str, click.Command, click.Context]]:
    """Every command below a group: how it is called, itself, and the context its help is made in."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context)
        if isinstance(command, click.Group):
            yield from commands(command, inner)
        else:
            yield inner.command_path, command, inner


def reference() -> str:
    """The page: exit statuses, then a section for each command, those that only the chart's pods run last."""
    found = sorted(commands(genvalues, click.Context(genvalues, info_name="genvalues")), key=runs_in_pods)
    contents = "Commands: " + ", ".join(f"[{path}](#{anchor(path).replace(' ', '-')})" for path, _, _ in found) + ".\n"
    statuses = f"## Exit status\n\n{indented(inspect.cleandoc(EXIT_STATUS.partition(':')[2]))}"
    sections = [section(path, command, context) for path, command, context in found]
    return "\n".join([INTRODUCTION, contents, statuses, COMPLETION, *sections])


def runs_in_pods(found: tuple[str, click.Command, click.Context]) -> bool:
    return found[0].split()[1] in IN_PODS


def section(path: str, command: click.Command, context: click.Context) -> str:
    usage = command.get_usage(context).removeprefix("Usage: ")
    text, example = split_help(command)
    lines = [[code(option), text] for option, text in options(command, context)]
    parts = [f"## {path}\n\n    {' '.join(usage.split())}\n", paragraphs(text)]
    parts += [indented(example)] if example else []
    parts += [table(["Option", "What for"], lines)] if lines else []
    return "\n".join(parts)


def split_help(command: click.Command) -> tuple[str, str]:
    """What a command's help says, and the lines of its example."""
    text, _, example = inspect.cleandoc(command.help or "").partition("\b\nExample:\n")
    return text.strip(), inspect.cleandoc(example)


def options(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    for parameter in command.params:
        if isinstance(parameter, click.Option) and (record := parameter.get_help_record(context)):
            yield " ".join(record[0].split()), " ".join(record[1].split())


def paragraphs(text: str) -> str:
    """Help's paragraphs as Markdown's; after \\b the lines as they are, as code."""
    blocks = re.split(r"\n{2,}", inspect.cleandoc(text))
    done = [indented(block.removeprefix("\b\n")) if block.startswith("\b") else f"{block}\n" for block in blocks]
    return "\n".join(done)


def indented(block: str) -> str:
    return "".join(f"    {line}\n" if line else "\n" for line in block.splitlines())


if __name__ == "__main__":
    REFERENCE.write_text(reference(), encoding="utf-8")
