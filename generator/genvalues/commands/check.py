from __future__ import annotations

import logging
import sys

import click

from genvalues.commands.options import inputs, json_option, no_problems_in
from genvalues.inputs.input_options import Sources

log = logging.getLogger(__name__)


@click.command(short_help="Check an inputs file and report every error at once.")
@inputs
@json_option
def check(sources: Sources, as_json: bool) -> None:
    """Check an inputs file and report every error at once, with its place and what to write instead.

    With --json the document has `findings`, each with `level` (error or warning), `key`, `where`, `line` (null for an
    option), `message` and `fix`, and `exitStatus`, which is the command's: 0, or 2 if there is an error.

    \b
    Example:
        genvalues check finetune.yaml
    """
    from genvalues.inputs.write import checked

    if as_json:
        from genvalues.common.reports import print_json
        from genvalues.inputs.findings import findings_of

        document = findings_of(sources)
        print_json(document)
        sys.exit(document["exitStatus"])
    checked(sources)
    log.info(no_problems_in(sources))
