from __future__ import annotations

import sys

import click

from genvalues.commands.options import context_option, inputs, json_option, namespace_option
from genvalues.inputs.input_options import Sources


@click.command(short_help="Run preflight checks, run the pipeline on a cluster, follow it.")
@inputs
@click.option("--release", metavar="NAME", help="Name of the release. Default: the name in the inputs.")
@namespace_option
@context_option
@click.option("--no-follow", is_flag=True, help="Exit when Helm does; in mode detached after seconds.")
@click.option("--skip-preflight", is_flag=True, help="Skip the checks of AWS, the Hub and the cluster.")
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
    """Check an inputs file, run the preflight checks, and run the pipeline on a cluster (helm upgrade --install).

    Then follow the stages until the pipeline ends. Exit status: 0 when all stages are done, 1 when one has failed, 2
    when you must change something. Ctrl-C stops following, not the training. If a killed Helm client has left the
    release pending, install takes it over; training that still runs is followed, not restarted.

    \b
    Example:
        genvalues install finetune.yaml --namespace kubeflow
    """
    from genvalues.common.reports import print_json
    from genvalues.ops.install import install

    options = {"follow": not no_follow, "preflight": not skip_preflight, "as_json": as_json}
    exit_status, document = install(sources, release, namespace, context, **options)
    if as_json:
        print_json(document)
    sys.exit(exit_status)
