from __future__ import annotations

import json
import sys

import click

from genvalues.commands.options import context_option, json_option, namespace_option


@click.command(short_help="Stop what runs of a release, and remove it.")
@click.argument("name")
@namespace_option
@context_option
@click.option("-y", "--yes", is_flag=True, help="Don't ask. Nothing is asked where there is no terminal.")
@json_option
def uninstall(name: str, namespace: str | None, context: str | None, yes: bool, as_json: bool) -> None:
    """Stop what runs of the release NAME and remove it; say what stays, what of it costs money, and how to remove that.

    \b
    Example:
        genvalues uninstall llama-lora --namespace kubeflow
    """
    from genvalues.ops.status import watcher
    from genvalues.ops.uninstall import uninstall

    def confirm(question: str) -> bool:
        return yes or not sys.stdin.isatty() or click.confirm(question, err=True)

    def say(line: str) -> None:
        click.echo(line, err=True)

    status, document = uninstall(watcher(name, namespace, context), say, confirm)
    if as_json:
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    sys.exit(status)
