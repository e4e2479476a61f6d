from __future__ import annotations

from pathlib import Path

import click

from genvalues.commands.options import inputs
from genvalues.inputs.input_options import Sources


@click.command(short_help="Check an inputs file and write the chart's values.")
@inputs
@click.option(
    "-o", "--output", default="values.yaml", show_default=True, metavar="FILE", help="Where to; - for stdout."
)
@click.option("--force", is_flag=True, help="Over a file that was edited, or that genvalues did not write, too.")
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
    click.echo(f"{sources.are_right}. Wrote {output}.", err=True)
