from __future__ import annotations

import logging

import click

from genvalues.commands.options import inputs, no_problems_in
from genvalues.inputs.input_options import Sources

log = logging.getLogger(__name__)


@click.command(short_help="Check an inputs file and report every error at once.")
@inputs
def check(sources: Sources) -> None:
    """Check an inputs file and report every error at once, with its place and what to write instead.

    \b
    Example:
        genvalues check finetune.yaml
    """
    from genvalues.inputs.write import checked

    checked(sources)
    log.info(no_problems_in(sources))
