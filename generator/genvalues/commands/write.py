from __future__ import annotations

from pathlib import Path

import click

from genvalues.commands.options import inputs
from genvalues.sources import Sources


@click.command()
@inputs
@click.option(
    "-o", "--output", default="values.yaml", show_default=True, metavar="FILE", help="Where to; - for stdout."
)
def write(sources: Sources, output: str) -> None:
    """Check an inputs file and write the chart's values.

    \b
    Example:
        genvalues write finetune.yaml -o values.yaml --set training.maxSteps=10
        helm install llama-lora ./chart -f values.yaml
    """
    from genvalues.write import checked, text_of, write_values

    text = text_of(checked(sources), sources)
    if output == "-":
        click.echo(text, nl=False)
        return
    write_values(Path(output), text, inputs=sources.file)
    click.echo(f"{sources.file} is right. Wrote {output}.", err=True)
