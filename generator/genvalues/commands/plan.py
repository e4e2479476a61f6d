from __future__ import annotations

import sys

import click

from genvalues.commands.options import inputs, json_option
from genvalues.inputs.input_options import Sources


@click.command(short_help="Show what a run would be: layout, memory, hours, dollars.")
@inputs
@json_option
@click.option("--live", is_flag=True, help="Ask the AWS Pricing API for today's price of a node-hour.")
@click.option("--offline", is_flag=True, help="Ask nobody: neither the Hub for a model's sizes nor AWS.")
@click.option("--region", metavar="REGION", help="Where the nodes are; the region of the image in ECR when left out.")
def plan(sources: Sources, as_json: bool, live: bool, offline: bool, region: str | None) -> None:
    """Show what a run would be, before a node is paid for: layout and batch with their reasons, memory, hours, dollars.

    \b
    Example:
        genvalues plan finetune.yaml --set nodes=2
    """
    from genvalues.ops.live_plan import planned
    from genvalues.planner import report

    found = planned(sources, live=live, offline=offline, region=region)
    if as_json:
        import json

        click.echo(json.dumps(report.as_json(found), indent=2, ensure_ascii=False))
    elif sys.stdout.isatty():
        report.print_rich(found)
    else:
        click.echo(report.as_text(found), nl=False)
