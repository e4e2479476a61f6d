from __future__ import annotations

import sys
from pathlib import Path

import click

from genvalues.commands.options import inputs, path
from genvalues.inputs.input_options import Sources


@click.command(short_help="Run the chart's stages on this computer.")
@inputs
@path("--workspace", required=True, metavar="DIR", help="The folder that replaces the volume.")
@click.option("--cpu", is_flag=True, help="Run a configuration for Trainium on the CPU: one process.")
def local(sources: Sources, workspace: Path, cpu: bool) -> None:
    """Run the chart's stages on this computer, as processes, one after the other.

    FILE is an inputs file, a values file, or an archive written by `genvalues bundle`, whose release is run again. -f,
    --set and --set-string require an inputs file.

    On Ctrl-C or SIGTERM a training saves a checkpoint and ends, within 110 s; a second Ctrl-C ends it at once. The next
    run continues there.

    \b
    Example:
        genvalues local finetune.yaml --set instance=cpu --workspace ./workspace
        genvalues local llama-lora-bundle.tar.gz --workspace ./workspace --cpu
    """
    from genvalues.ops.local.run import run_locally

    sys.exit(run_locally(sources, workspace, on_cpu=cpu))
