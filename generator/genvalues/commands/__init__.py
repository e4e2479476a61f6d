"""The commands of genvalues, a module each. They parse and print; the work is elsewhere.

A module imports only click and ``options``; what a command needs is imported when it runs, so that every one starts as
fast as it can.
"""

from __future__ import annotations

from importlib import import_module

import click

# In the order of a user's day, which is the order of --help and of docs/genvalues.md.
MODULES = {
    "init": "genvalues.commands.init",
    "check": "genvalues.commands.check",
    "plan": "genvalues.commands.plan",
    "write": "genvalues.commands.write",
    "image": "genvalues.commands.image",
    "preflight": "genvalues.commands.preflight",
    "install": "genvalues.commands.install",
    "status": "genvalues.commands.status",
    "logs": "genvalues.commands.logs",
    "bundle": "genvalues.commands.bundle",
    "uninstall": "genvalues.commands.uninstall",
    "local": "genvalues.commands.local",
    "schema": "genvalues.commands.schema",
    "cluster": "genvalues.commands.cluster",
}
IN_PODS = {"cluster"}  # not for people


class Commands(click.Group):
    """The commands above, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in MODULES:
            return None
        command: click.Command = getattr(import_module(MODULES[cmd_name]), cmd_name)
        return command
