from __future__ import annotations

import json
import sys

import click

from genvalues.commands.options import context_option, json_option, namespace_option


@click.command(short_help="Show where a release stands: stages, progress, cost.")
@click.argument("name")
@namespace_option
@context_option
@click.option("--watch", is_flag=True, help="Follow to the end, and end as install does.")
@json_option
def status(name: str, namespace: str | None, context: str | None, watch: bool, as_json: bool) -> None:
    """Where the release NAME stands: its stages, their progress and cost, and why one has failed.

    Status 0 when it could be shown, whatever it shows; with --watch 0 when the pipeline is done, 1 when a stage has
    failed, 2 when something must be changed.

    \b
    Example:
        genvalues status llama-lora --namespace kubeflow --watch
    """
    from genvalues.ops import follow
    from genvalues.ops.status import as_json as document_of
    from genvalues.ops.status import print_status, watcher

    def say(line: str) -> None:
        click.echo(line, err=as_json)

    looking = watcher(name, namespace, context)
    try:
        found = follow.Follower(looking, say).to_the_end() if watch else looking.look()
    except KeyboardInterrupt:
        click.echo(f"Stopped following. The cluster goes on with {name}.", err=True)
        sys.exit(130)
    if as_json:
        click.echo(json.dumps(document_of(found), indent=2, ensure_ascii=False))
    elif watch:
        for line in follow.closing(found):
            say(line)
    else:
        print_status(found)
    sys.exit(found.exit_status if watch else 0)
