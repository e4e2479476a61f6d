from __future__ import annotations

import click

from genvalues.commands.options import inputs
from genvalues.sources import Sources


@click.command(short_help="Check an inputs file: every mistake at once.")
@inputs
def check(sources: Sources) -> None:
    """Check an inputs file: every mistake at once, with its place and what to write instead.

    \b
    Example:
        genvalues check finetune.yaml
    """
    from genvalues.write import checked

    checked(sources)
    click.echo(f"{sources.are_right}.", err=True)
