from __future__ import annotations

import sys
from pathlib import Path

import click

from genvalues.commands.options import context_option, json_option, namespace_option, path


@click.command(short_help="Fetch the report of a release from its volume.")
@click.argument("name")
@namespace_option
@context_option
@path("-o", "--output", metavar="FILE", help="The file to write. Default: report.html; with --workspace none.")
@path("--workspace", metavar="DIR", help="Read the run NAME of `genvalues local` in this workspace, and no cluster.")
@json_option
def report(
    name: str,
    namespace: str | None,
    context: str | None,
    output: Path | None,
    workspace: Path | None,
    as_json: bool,
) -> None:
    """Fetch report.html of the release NAME: one file without external resources, to open in a browser.

    A pod reads it from the volume, mounted read-only, and prints it to its log. The pod is deleted afterwards. Prints
    the path of the file.

    \b
    Example:
        genvalues report llama-lora --namespace kubeflow -o report.html
        genvalues report llama-lora --workspace ./workspace
    """
    from genvalues.common.reports import print_json
    from genvalues.ops.report import fetch_report, local_report
    from genvalues.ops.status import watch_release

    try:
        if workspace is not None:
            document = local_report(workspace, name, output)
        else:
            document = fetch_report(watch_release(name, namespace, context), output or Path("report.html"))
    except KeyboardInterrupt:
        sys.exit(130)
    if as_json:
        print_json(document)
    else:
        click.echo(document["file"])
