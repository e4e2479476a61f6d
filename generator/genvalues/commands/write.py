from __future__ import annotations

import logging
from pathlib import Path

import click

from genvalues.commands.options import inputs, no_problems_in
from genvalues.common.text import one_line
from genvalues.inputs.input_options import Sources

log = logging.getLogger(__name__)


@click.command(short_help="Check an inputs file and write the chart's values.")
@inputs
@click.option(
    "-o", "--output", default="values.yaml", show_default=True, metavar="FILE", help="The file to write; - for stdout."
)
@click.option("--force", is_flag=True, help="Overwrite a file that was edited or that genvalues did not write.")
def write(sources: Sources, output: str, force: bool) -> None:
    """Check an inputs file and write the chart's values.

    \b
    Example:
        genvalues write finetune.yaml -f trn2.yaml -o values.yaml --set training.maxSteps=10
        helm install llama-lora ./chart -f values.yaml
    """
    from genvalues.inputs.write import checked, text_of, write_values

    to_stdout = output == "-"
    text = text_of(checked(sources), sources, None if to_stdout else Path(output))
    if to_stdout:
        click.echo(text.encode("utf-8"), nl=False)
        return
    write_values(Path(output), text, sources.files, force=force)
    log.info("%s Wrote %s.", no_problems_in(sources), one_line(output, 200))
