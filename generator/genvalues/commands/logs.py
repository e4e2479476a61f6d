from __future__ import annotations

import sys

import click

from genvalues.commands.options import context_option, json_option, namespace_option

# The chart's stages in the order in which they run, and the runner of mode detached: for shell completion without a
# cluster. A release may have fewer; other names, such as train-gate, are accepted, too.
STAGES = (
    *("preflight", "storage-prepare", "tokenize", "rehearse", "compile", "neff", "train", "consolidate", "merge"),
    *("evaluate", "publish", "runner"),
)


def complete_stage(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    return [stage for stage in STAGES if stage.startswith(incomplete)]


@click.command(short_help="Print the log of a release's stage.")
@click.argument("name")
@click.argument("stage", required=False, shell_complete=complete_stage)
@namespace_option
@context_option
@click.option("-f", "--follow", is_flag=True, help="Follow until the stage ends, through restarts and new pods.")
@click.option("--tail", type=click.IntRange(min=1), help="Number of last lines to print of each pod. Default: all.")
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
    """Print the log of a stage of the release NAME. Default for STAGE: the stage that runs, else the one that failed.

    Lines of workers start with their pod's name. If the workers' pods no longer exist, the gate's log is printed, which
    ends with their last lines.

    \b
    Example:
        genvalues logs llama-lora train -f --namespace kubeflow
    """
    from genvalues.common.reports import print_json
    from genvalues.ops.logs import write_log
    from genvalues.ops.status import watch_release

    lines: list[str] = []
    write = lines.append if as_json else click.echo
    try:
        of = write_log(watch_release(name, namespace, context), stage, follow=follow, tail=tail, write=write)
    except KeyboardInterrupt:
        sys.exit(130)
    if as_json:
        print_json({"release": name, "stage": of, "lines": lines})
