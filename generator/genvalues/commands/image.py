from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from genvalues.commands.options import Command, decorated


@click.group(short_help="Build and push the image of the stages.")
def image() -> None:
    """Build the image that every stage runs, push it, and write its digest into the inputs file."""


def image_options(command: Command) -> Command:
    """The argument and options of both build and push."""
    return decorated(
        command,
        click.argument("file", type=click.Path(path_type=Path), default="finetune.yaml"),
        click.option(
            "--builder",
            type=click.Choice(["docker", "podman", "buildah"]),
            help="The builder. Default: the first one found.",
        ),
        click.option(
            "--network", metavar="NAME", help="The network of the build. Default in SageMaker Studio: sagemaker."
        ),
        click.option(
            "--base",
            metavar="IMAGE",
            help="The base image. Required for backend native. Default for xla: AWS's container of the region.",
        ),
        click.option(
            "--neuron-runtime",
            metavar="VERSION",
            help="Backend xla: install this Neuron runtime, such as 2.33.10.0, for nodes with driver 2.29 or newer.",
        ),
    )


@image.command("build")
@image_options
def image_build(**options: Any) -> None:
    """Build the image that FILE (finetune.yaml) names. Needs an x86-64 machine.

    \b
    Example:
        genvalues image build finetune.yaml --base public.ecr.aws/neuron/NAME:TAG
    """
    from genvalues.ops.image import build

    sys.exit(build(**options))


@image.command("push")
@image_options
def image_push(**options: Any) -> None:
    """Build the image that FILE (finetune.yaml) names, push it, and write its digest into FILE.

    Creates the ECR repository if it does not exist, with scan on push and immutable tags.

    \b
    Example:
        genvalues image push finetune.yaml --base public.ecr.aws/neuron/NAME:TAG
    """
    from genvalues.ops.image import build

    sys.exit(build(**options, push=True))
