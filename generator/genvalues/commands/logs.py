from __future__ import annotations

import json
import sys

import click

from genvalues.commands.options import context_option, json_option, namespace_option

# The chart's, in the order in which they run, and the detached mode's runner: to complete what is typed without asking
# a cluster. A release may have fewer; what is not among them is asked for all the same, e.g. train-gate.
STAGES = (
    *("preflight", "storage-prepare", "tokenize", "compile", "neff", "train", "consolidate", "merge", "evaluate"),
    "runner",
)


def beginning_with(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    return [stage for stage in STAGES if stage.startswith(incomplete)]


@click.command(short_help="Print the log of a release's stage.")
@click.argument("name")
@click.argument("stage", required=False, shell_complete=beginning_with)
@namespace_option
@context_option
@click.option("-f", "--follow", is_flag=True, help="Go on until the stage ends, through restarts and new pods.")
@click.option("--tail", type=click.IntRange(min=1), help="Only the last lines, of each pod; all when left out.")
@json_option
def logs(
    name: str,
    stage: str | None,
    namespace: str | None,
    context: str | None,
    follow: bool,
    tail: int | None,
    as_json: bool,
) -> None:
    """The log of a stage of the release NAME: of STAGE, else of the one that runs, else of the one that failed.

    Workers' lines have their pod in front. Where the workers' pods are gone, the gate's log tells their last lines.

    \b
    Example:
        genvalues logs llama-lora train -f --namespace kubeflow
    """
    from genvalues.ops.logs import logs
    from genvalues.ops.status import watcher

    lines: list[str] = []
    write = lines.append if as_json else click.echo
    try:
        of = logs(
            watcher(name, namespace, context),
            stage,
            follow=follow,
            tail=tail,
            write=write,
            say=lambda line: click.echo(line, err=True),
        )
    except KeyboardInterrupt:
        sys.exit(130)
    if as_json:
        click.echo(json.dumps({"release": name, "stage": of, "lines": lines}, indent=2, ensure_ascii=False))
