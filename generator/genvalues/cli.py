"""The command genvalues. Commands parse and print; data goes to stdout, talk to stderr.

Exit status: 0 done, 2 the user must change something, 1 anything else; `local` ends as its first failing stage does.
Stopped by a signal, `image`, `install` and `local` end with 128 and its number (130: Ctrl-C).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from genvalues.errors import user_errors_end_with_status_2

# Everything else is imported in the command that uses it, so that --help and check start fast.

FILE = click.argument("file", type=click.Path(path_type=Path))
SET = click.option("--set", "sets", metavar="KEY=VALUE", multiple=True, help="Change one key, e.g. --set lora.r=8.")
CHART = click.option(
    "--chart", type=click.Path(path_type=Path), help="The chart's folder; ./chart or the source tree's when left out."
)


class Commands(click.Group):
    """The commands below, and the group `cluster`, imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), "cluster"])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "cluster":
            from genvalues.cluster.cli import cluster

            return cluster
        return super().get_command(ctx, cmd_name)


def version() -> str:
    from importlib.metadata import version

    return version("llama-lora")


def show_version(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"genvalues {version()}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, callback=show_version, expose_value=False, is_eager=True, help="Show the version."
)
def genvalues() -> None:
    """From a short inputs file to a LoRA fine-tune of Llama on Trainium: checked values for the chart llama-lora."""


@genvalues.command()
@FILE
@click.option(
    "-o", "--output", default="values.yaml", show_default=True, metavar="FILE", help="Where to; - for stdout."
)
@SET
@CHART
def write(file: Path, output: str, sets: tuple[str, ...], chart: Path | None) -> None:
    """Check an inputs file and write the chart's values.

    \b
    Example:
        genvalues write finetune.yaml -o values.yaml --set training.maxSteps=10
        helm install llama-lora ./chart -f values.yaml
    """
    from genvalues.write import values_text, write_values

    text = values_text(file, sets, chart, version())
    if output == "-":
        click.echo(text, nl=False)
        return
    write_values(Path(output), text, inputs=file)
    click.echo(f"{file} is right. Wrote {output}.", err=True)


@genvalues.command()
@FILE
@SET
@CHART
def check(file: Path, sets: tuple[str, ...], chart: Path | None) -> None:
    """Check an inputs file: every mistake at once, with its place and what to write instead.

    \b
    Example:
        genvalues check finetune.yaml
    """
    from genvalues.write import values_text

    values_text(file, sets, chart, version())
    click.echo(f"{file} is right.", err=True)


@genvalues.command()
@FILE
@SET
@CHART
@click.option("--release", metavar="NAME", help="The release's name; the inputs' name when left out.")
@click.option("-n", "--namespace", envvar="HELM_NAMESPACE", help="Where to; the context's namespace when left out.")
@click.option("--kube-context", envvar="HELM_KUBECONTEXT", help="The cluster; the current context when left out.")
def install(
    file: Path,
    sets: tuple[str, ...],
    chart: Path | None,
    release: str | None,
    namespace: str | None,
    kube_context: str | None,
) -> None:
    """Check an inputs file and run the pipeline on a cluster: helm upgrade --install with the values written for it.

    A release that a killed Helm client has left pending is taken over. What still trains is not stopped but followed.

    \b
    Example:
        genvalues install finetune.yaml --namespace kubeflow
    """
    from genvalues.install import install

    sys.exit(install(file, sets, chart, version(), release, namespace, kube_context))


@genvalues.command()
@click.argument("values", type=click.Path(path_type=Path))
@click.option(
    "--workspace", required=True, type=click.Path(path_type=Path), help="Folder that takes the volume's place."
)
@CHART
def local(values: Path, workspace: Path, chart: Path | None) -> None:
    """Run the chart's stages on this computer, as processes, one after the other.

    \b
    Example:
        genvalues write finetune.yaml --set instance=cpu && genvalues local values.yaml --workspace ./workspace
    """
    from genvalues.local import run

    sys.exit(run(values, workspace, chart))


@genvalues.group()
def image() -> None:
    """The image of the stages: build it, push it, and have its digest written into the inputs file."""


INPUTS = click.argument("file", type=click.Path(path_type=Path), default="finetune.yaml")


def image_options(command: Any) -> Any:
    """What build and push have in common."""
    builders = ["docker", "podman", "buildah"]
    for option in (
        click.option("--base", metavar="IMAGE", help="Build upon this; AWS's container of the region when left out."),
        click.option("--network", metavar="NAME", help="For the build; sagemaker in SageMaker Studio when left out."),
        click.option("--builder", type=click.Choice(builders), help="The first there is when left out."),
    ):
        command = option(command)
    return command


@image.command("build")
@INPUTS
@image_options
def image_build(file: Path, builder: str | None, network: str | None, base: str | None) -> None:
    """Build the image that FILE (finetune.yaml) names, on this x86-64 machine.

    \b
    Example:
        genvalues image build finetune.yaml
    """
    from genvalues.image.build import build

    sys.exit(build(file, builder, network, base, version()))


@image.command("push")
@INPUTS
@image_options
def image_push(file: Path, builder: str | None, network: str | None, base: str | None) -> None:
    """Build the image that FILE (finetune.yaml) names, push it, and write its digest into FILE.

    A repository that ECR does not have is made, with scan on push and immutable tags.

    \b
    Example:
        genvalues image push finetune.yaml
    """
    from genvalues.image.build import push

    sys.exit(push(file, builder, network, base, version()))


@user_errors_end_with_status_2
def main() -> None:
    genvalues()


if __name__ == "__main__":
    main()
