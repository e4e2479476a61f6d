from __future__ import annotations

import sys

import click

from genvalues.commands.options import context_option, inputs, json_option, namespace_option
from genvalues.inputs.input_options import Sources


@click.command(short_help="Check AWS, the Hub and the cluster before a run.")
@inputs
@click.option("--aws", is_flag=True, help="Check AWS only: credentials, quota, capacity, image, storage, dataset.")
@click.option("--cluster", is_flag=True, help="Check the cluster only: everything that the chart's preflight checks.")
@click.option("--offline", is_flag=True, help="No network access: checks that need an answer are not made.")
@json_option
@click.option("--region", help="The AWS region. Default: from the image's address, AWS_REGION or the profile.")
@namespace_option
@context_option
@click.option("--release", metavar="NAME", help="The release's name. Default: the name in the inputs.")
def preflight(
    sources: Sources,
    aws: bool,
    cluster: bool,
    offline: bool,
    as_json: bool,
    region: str | None,
    namespace: str | None,
    context: str | None,
    release: str | None,
) -> None:
    """Check that AWS, the Hugging Face Hub and the cluster have what the run needs, before anything is paid for.

    With --aws, --cluster or both, check only those. Exit status: 2 if a finding stops the run, 1 if none does but a
    service did not answer, otherwise 0.

    \b
    Example:
        genvalues preflight finetune.yaml --namespace kubeflow
    """
    from genvalues.common import findings
    from genvalues.common.reports import print_json
    from genvalues.inputs.write import checked
    from genvalues.ops.preflight import run

    everything = not (aws or cluster)
    found = run.run_preflight(
        checked(sources),
        aws=aws or everything,
        cluster=cluster or everything,
        hub=everything,
        offline=offline,
        namespace=namespace,
        context=context,
        release=release,
        region=region,
        chart=sources.chart,
    )
    if as_json:
        print_json(findings.as_json(found))
    else:
        findings.show(found, click.echo)
    sys.exit(findings.exit_status(found))
