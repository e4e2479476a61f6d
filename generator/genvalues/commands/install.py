from __future__ import annotations

import sys

import click

from genvalues.commands.options import context_option, inputs, json_option, namespace_option
from genvalues.inputs.input_options import Sources


@click.command(short_help="Check everything, run the pipeline on a cluster, follow it.")
@inputs
@click.option("--release", metavar="NAME", help="The release's name; the inputs' name when left out.")
@namespace_option
@context_option
@click.option("--no-follow", is_flag=True, help="End when Helm does: in mode detached, in seconds.")
@click.option("--skip-preflight", is_flag=True, help="Don't ask AWS, the Hub and the cluster first.")
@json_option
def install(
    sources: Sources,
    release: str | None,
    namespace: str | None,
    context: str | None,
    no_follow: bool,
    skip_preflight: bool,
    as_json: bool,
) -> None:
    """Check an inputs file, ask the world (preflight), and run the pipeline on a cluster: helm upgrade --install.

    Then follows the stages to the end: status 0 when all are done, 1 when one has failed, 2 when something must be
    changed. Ctrl-C stops the following, not the training. A release that a killed Helm client has left pending is taken
    over; what still trains is followed.

    \b
    Example:
        genvalues install finetune.yaml --namespace kubeflow
    """
    from genvalues.ops.install import Where, install

    where = Where(release, namespace, context)
    sys.exit(install(sources, where, follow=not no_follow, preflight=not skip_preflight, as_json=as_json))
