from __future__ import annotations

from pathlib import Path

import click

from genvalues.commands.options import chart_option


@click.command(short_help="Print the JSON schema of an inputs file.")
@click.option("--values", is_flag=True, help="Print the schema of the chart's values instead.")
@chart_option
def schema(values: bool, chart: Path | None) -> None:
    """Print the JSON schema of an inputs file, for editors and programs.

    \b
    Example:
        genvalues schema > inputs.schema.json
    """
    from genvalues.common.errors import UserError
    from genvalues.inputs.chart import need_chart, values_schema_text
    from genvalues.settings.inputs import SCHEMA

    if chart and not values:
        raise UserError("requires --values", where=f"--chart {chart}", fix="Add --values, or remove --chart.")
    text = values_schema_text(need_chart(chart)) if values else SCHEMA.read_text(encoding="utf-8")
    click.echo(text.encode("utf-8"), nl=False)
