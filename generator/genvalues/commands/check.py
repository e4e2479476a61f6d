from __future__ import annotations

import click

from genvalues.commands.options import inputs
from genvalues.inputs.input_options import Sources


@click.command(short_help="Check an inputs file: every mistake at once.")
@inputs
def check(sources: Sources) -> None:
    """Check an inputs file: every mistake at once, with its place and what to write instead.

    \b
    Example:
        genvalues check finetune.yaml
    """
    from genvalues.inputs.write import checked

    checked(sources)
    click.echo(f"{sources.are_right}.", err=True)
