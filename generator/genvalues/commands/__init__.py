"""The commands of genvalues, one module each. They parse options and print; other rooms do the work.

A module imports click and ``options`` only. A command imports what it needs when it runs, so that all start fast.
"""

from __future__ import annotations

from importlib import import_module

import click

# In the order in which users need them: the order of --help and of docs/genvalues.md.
COMMANDS = (
    *("init", "check", "preview", "plan", "write", "image", "preflight", "install", "status", "logs", "report"),
    *("bundle", "uninstall", "local", "schema", "cluster"),
)
IN_PODS = {"cluster"}  # only the chart's pods run these


class Commands(click.Group):
    """A group that imports a command when it is first used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return getattr(import_module(f"{__name__}.{cmd_name}"), cmd_name) if cmd_name in COMMANDS else None
