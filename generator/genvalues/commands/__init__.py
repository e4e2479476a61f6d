"""The commands of genvalues, one module each. They parse options and print; other rooms do the work.

A module imports click and ``options`` only. A command imports what it needs when it runs, so that all start fast.
"""

from __future__ import annotations

from importlib import import_module

import click

# In the order in which users need them: the order of --help and of docs/genvalues.md.
MODULES = {
    "init": "genvalues.commands.init",
    "check": "genvalues.commands.check",
    "preview": "genvalues.commands.preview",
    "plan": "genvalues.commands.plan",
    "write": "genvalues.commands.write",
    "image": "genvalues.commands.image",
    "preflight": "genvalues.commands.preflight",
    "install": "genvalues.commands.install",
    "status": "genvalues.commands.status",
    "logs": "genvalues.commands.logs",
    "report": "genvalues.commands.report",
    "bundle": "genvalues.commands.bundle",
    "uninstall": "genvalues.commands.uninstall",
    "local": "genvalues.commands.local",
    "schema": "genvalues.commands.schema",
    "cluster": "genvalues.commands.cluster",
}
IN_PODS = {"cluster"}  # only the chart's pods run these


class Commands(click.Group):
    """A group that imports a command when it is first used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in MODULES:
            return None
        command: click.Command = getattr(import_module(MODULES[cmd_name]), cmd_name)
        return command
