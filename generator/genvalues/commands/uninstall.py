from __future__ import annotations

import sys

import click

from genvalues.commands.options import context_option, json_option, namespace_option


@click.command(short_help="Stop a release's stages and uninstall it.")
@click.argument("name")
@namespace_option
@context_option
@click.option("-y", "--yes", is_flag=True, help="Do not ask for confirmation. Implied when stdin is not a terminal.")
@json_option
def uninstall(name: str, namespace: str | None, context: str | None, yes: bool, as_json: bool) -> None:
    """Stop the stages of the release NAME and uninstall it. Lists what remains, what costs money, and how to remove it.

    \b
    Example:
        genvalues uninstall llama-lora --namespace kubeflow
    """
    from genvalues.common.reports import document_of, print_json
    from genvalues.ops.status import watch_release
    from genvalues.ops.uninstall import uninstall

    def confirm(question: str) -> bool:
        return yes or not sys.stdin.isatty() or click.confirm(question, err=True)

    report = uninstall(watch_release(name, namespace, context), confirm)
    if as_json:
        print_json(document_of(report))
    elif report.stays:
        click.echo("\n".join(report.lines()))
    sys.exit(report.exit_status)
