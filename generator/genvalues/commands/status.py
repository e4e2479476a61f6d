from __future__ import annotations

import sys

import click

from genvalues.commands.options import context_option, json_option, namespace_option


@click.command(short_help="Show the status of a release: stages, progress, cost.")
@click.argument("name")
@namespace_option
@context_option
@click.option("--watch", is_flag=True, help="Follow until the pipeline ends; exit status as for install.")
@json_option
def status(name: str, namespace: str | None, context: str | None, watch: bool, as_json: bool) -> None:
    """Show the status of the release NAME: its stages, their progress and cost, and why one has failed.

    Exit status: 0 when the status could be shown, whatever it is. With --watch: 0 when the pipeline is done, 1 when a
    stage has failed, 2 when you must change something.

    \b
    Example:
        genvalues status llama-lora --namespace kubeflow --watch
    """
    from genvalues.common.reports import print_json
    from genvalues.ops.follow import ReleaseFollower
    from genvalues.ops.status import watch_release
    from genvalues.ops.status_text import final_lines, status_lines

    watcher = watch_release(name, namespace, context)
    follower = ReleaseFollower(watcher)
    try:
        for line in follower.follow() if watch else ():
            click.echo(line, err=as_json)
        found = follower.status or watcher.status()
    except KeyboardInterrupt:
        click.echo(f"Stopped following. {name} continues in the cluster.", err=True)
        sys.exit(130)
    if as_json:
        print_json(found.document())
    else:
        click.echo("\n".join(final_lines(found) if watch else status_lines(found)))
    sys.exit(found.exit_status if watch else 0)
