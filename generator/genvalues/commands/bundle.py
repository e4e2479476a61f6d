from __future__ import annotations

import json
from pathlib import Path

import click

from genvalues.commands.options import context_option, json_option, namespace_option, path


@click.command(short_help="Pack what a bug report of a release needs.")
@click.argument("name")
@namespace_option
@context_option
@path("-o", "--output", metavar="FILE", help="Where to; NAME-bundle.tar.gz when left out.")
@json_option
def bundle(name: str, namespace: str | None, context: str | None, output: Path | None, as_json: bool) -> None:
    """Pack what a bug report needs of the release NAME into one archive, redacted: values, objects, events, logs, and
    the stages' manifests as the logs tell them.

    \b
    Example:
        genvalues bundle llama-lora --namespace kubeflow -o report.tar.gz
        genvalues local report.tar.gz --workspace ./workspace --cpu
    """
    from genvalues.ops.bundle import bundle
    from genvalues.ops.status import watcher

    def say(line: str) -> None:
        click.echo(line, err=True)

    document = bundle(watcher(name, namespace, context), output or Path(f"{name}-bundle.tar.gz"), say)
    if as_json:
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
