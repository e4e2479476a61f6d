from __future__ import annotations

import sys

import click

from genvalues.commands.options import inputs
from genvalues.inputs.input_options import Sources


@click.command(short_help="Show rows as the model sees them.")
@inputs
@click.option(
    "--rows",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    help="How many examples of each source to show.",
)
def preview(sources: Sources, rows: int) -> None:
    """Show the first rows of the dataset as the model sees them, with what is trained in green, and a short report:
    rows dropped with their reasons, lengths, tokens lost, duplicates.

    Needs the trainer's libraries and the model's tokenizer, but no weights and no run. It reads the first 1,000 rows of
    each source. NO_COLOR turns colors off.

    \b
    Example:
        genvalues preview finetune.yaml --rows 10
    """
    from genvalues.ops.preview import show_rows

    sys.exit(show_rows(sources, rows))
