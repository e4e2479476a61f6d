from __future__ import annotations

from pathlib import Path

import click

from genvalues.commands.options import context_option, json_option, namespace_option, path


@click.command(short_help="Pack an archive for a bug report about a release.")
@click.argument("name")
@namespace_option
@context_option
@path("-o", "--output", metavar="FILE", help="The archive. Default: NAME-bundle.tar.gz.")
@json_option
def bundle(name: str, namespace: str | None, context: str | None, output: Path | None, as_json: bool) -> None:
    """Pack values, objects, events, logs and the stages' manifests of the release NAME into one redacted archive.

    \b
    Example:
        genvalues bundle llama-lora --namespace kubeflow -o report.tar.gz
        genvalues local report.tar.gz --workspace ./workspace --cpu
    """
    from genvalues.common.reports import print_json
    from genvalues.ops.bundle import bundle
    from genvalues.ops.status import watch_release

    document = bundle(watch_release(name, namespace, context), output or Path(f"{name}-bundle.tar.gz"))
    if as_json:
        print_json(document)
