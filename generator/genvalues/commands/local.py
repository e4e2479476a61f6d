from __future__ import annotations

import sys
from pathlib import Path

import click

from genvalues.commands.options import chart_option, path


@click.command(short_help="Run the chart's stages on this computer.")
@click.argument("values", type=click.Path(path_type=Path))
@path("--workspace", required=True, metavar="DIR", help="Folder that takes the volume's place.")
@click.option("--cpu", is_flag=True, help="Run values for Trainium on the CPU: one process, eager attention.")
@chart_option
def local(values: Path, workspace: Path, cpu: bool, chart: Path | None) -> None:
    """Run the chart's stages on this computer, as processes, one after the other.

    VALUES is a values file, or an archive that `genvalues bundle` has written: its release is run again.

    \b
    Example:
        genvalues write finetune.yaml --set instance=cpu && genvalues local values.yaml --workspace ./workspace
        genvalues local llama-lora-bundle.tar.gz --workspace ./workspace --cpu
    """
    from genvalues.ops.local import run

    sys.exit(run(values, workspace, chart, on_cpu=cpu))
