from __future__ import annotations

import sys
from pathlib import Path

import click

from genvalues.commands.options import Command, decorated


@click.group(short_help="Build and push the image of the stages.")
def image() -> None:
    """The image of the stages: build it, push it, and have its digest written into the inputs file."""


def image_options(command: Command) -> Command:
    """What build and push have in common."""
    return decorated(
        command,
        click.argument("file", type=click.Path(path_type=Path), default="finetune.yaml"),
        click.option(
            "--builder", type=click.Choice(["docker", "podman", "buildah"]), help="The first there is when left out."
        ),
        click.option("--network", metavar="NAME", help="For the build; sagemaker in SageMaker Studio when left out."),
        click.option("--base", metavar="IMAGE", help="Build upon this; AWS's container of the region when left out."),
    )


@image.command("build")
@image_options
def image_build(file: Path, builder: str | None, network: str | None, base: str | None) -> None:
    """Build the image that FILE (finetune.yaml) names, on this x86-64 machine.

    \b
    Example:
        genvalues image build finetune.yaml
    """
    from genvalues.ops.image.build import build

    sys.exit(build(file, builder, network, base))


@image.command("push")
@image_options
def image_push(file: Path, builder: str | None, network: str | None, base: str | None) -> None:
    """Build the image that FILE (finetune.yaml) names, push it, and write its digest into FILE.

    A repository that ECR does not have is made, with scan on push and immutable tags.

    \b
    Example:
        genvalues image push finetune.yaml
    """
    from genvalues.ops.image.build import push

    sys.exit(push(file, builder, network, base))
