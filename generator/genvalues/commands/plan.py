from __future__ import annotations

import sys

import click

from genvalues.commands.options import inputs, json_option
from genvalues.inputs.input_options import Sources


@click.command(short_help="Estimate a run: layout, memory, hours, cost.")
@inputs
@json_option
@click.option("--live", is_flag=True, help="Get the current price of a node-hour from the AWS Pricing API.")
@click.option("--offline", is_flag=True, help="No network access: no model sizes from the Hub, no prices from AWS.")
@click.option("--region", metavar="REGION", help="The nodes' AWS region. Default: the region of the image in ECR.")
@click.option(
    "--trace",
    is_flag=True,
    help="Backend native: trace a step of this run without a device, and compare memory. Needs the trainer's libraries "
    "and up to some minutes.",
)
def plan(sources: Sources, as_json: bool, live: bool, offline: bool, region: str | None, trace: bool) -> None:
    """Estimate a run before you pay for a node: layout and batch size with their reasons, memory, hours, cost.

    \b
    Example:
        genvalues plan finetune.yaml --set nodes=2
    """
    from genvalues.common.reports import print_json
    from genvalues.ops.live_plan import planned
    from genvalues.ops.trace import refuse_problems
    from genvalues.planner import report

    found = planned(sources, live=live, offline=offline, region=region, trace=trace)
    if as_json:
        print_json(report.as_json(found))
    elif sys.stdout.isatty():
        report.print_rich(found)
    else:
        click.echo(report.as_text(found), nl=False)
    if found.trace:
        refuse_problems(found.trace)
