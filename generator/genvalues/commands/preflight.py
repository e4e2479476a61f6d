from __future__ import annotations

import sys

import click

from genvalues.commands.options import context_option, inputs, json_option, namespace_option
from genvalues.inputs.input_options import Sources


@click.command(short_help="Ask AWS, the Hub and the cluster whether a run can begin.")
@inputs
@click.option("--aws", is_flag=True, help="AWS alone: credentials, quota, capacity, image, storage, dataset.")
@click.option("--cluster", is_flag=True, help="The cluster alone: all that the chart's own preflight checks.")
@click.option("--offline", is_flag=True, help="Ask nobody: what needs an answer is not checked.")
@json_option
@click.option("--region", help="AWS's; that of the image's address, of AWS_REGION or the profile when left out.")
@namespace_option
@context_option
@click.option("--release", metavar="NAME", help="The release's name; the inputs' name when left out.")
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
    """Check AWS, the Hugging Face Hub and the cluster for what this run needs, before anything is paid for.

    With --aws or --cluster, or both, those alone. Exit status: 2 when something stops the run, 1 when somebody gave no
    answer and nothing is known to stop it, else 0.

    \b
    Example:
        genvalues preflight finetune.yaml --namespace kubeflow
    """
    import json

    from genvalues.common.findings import as_json as document
    from genvalues.common.findings import exit_status
    from genvalues.inputs.write import checked
    from genvalues.ops.preflight import run, show

    everything = not (aws or cluster)
    findings = run(
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
        click.echo(json.dumps(document(findings), indent=2, ensure_ascii=False))
    else:
        show(findings, click.echo)
    sys.exit(exit_status(findings))
