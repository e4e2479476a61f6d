from __future__ import annotations

import sys

import click

from genvalues.commands.options import context_option, inputs, namespace_option
from genvalues.sources import Sources


@click.command()
@inputs
@click.option("--release", metavar="NAME", help="The release's name; the inputs' name when left out.")
@namespace_option
@context_option
def install(sources: Sources, release: str | None, namespace: str | None, context: str | None) -> None:
    """Check an inputs file and run the pipeline on a cluster: helm upgrade --install with the values written for it.

    A release that a killed Helm client has left pending is taken over. What still trains is not stopped but followed.

    \b
    Example:
        genvalues install finetune.yaml --namespace kubeflow
    """
    from genvalues.install import install

    sys.exit(install(sources, release, namespace, context))
