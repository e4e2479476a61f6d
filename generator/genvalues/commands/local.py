from __future__ import annotations

import sys
from pathlib import Path

import click

from genvalues.commands.options import chart_option, path


@click.command()
@click.argument("values", type=click.Path(path_type=Path))
@path("--workspace", required=True, metavar="DIR", help="Folder that takes the volume's place.")
@chart_option
def local(values: Path, workspace: Path, chart: Path | None) -> None:
    """Run the chart's stages on this computer, as processes, one after the other.

    \b
    Example:
        genvalues write finetune.yaml --set instance=cpu && genvalues local values.yaml --workspace ./workspace
    """
    from genvalues.local import run

    sys.exit(run(values, workspace, chart))
