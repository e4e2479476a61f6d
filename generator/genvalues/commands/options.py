"""What several commands take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from genvalues.inputs.input_options import Sources

Command = Callable[..., Any]


def path(*arguments: str, **settings: Any) -> Callable[[Command], Command]:
    return click.option(*arguments, type=click.Path(path_type=Path), **settings)


chart_option = path("--chart", metavar="DIR", help="The chart's folder; ./chart or the source tree's when left out.")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, for programs.")
namespace_option = click.option(
    "-n", "--namespace", envvar="HELM_NAMESPACE", help="Where the release is; the context's when left out."
)
context_option = click.option(
    "--kube-context", "context", envvar="HELM_KUBECONTEXT", help="The cluster; the current context when left out."
)


def inputs(command: Command) -> Command:
    """FILE, -f, --set, --set-string and --chart, which the command gets as one ``sources``."""

    @functools.wraps(command)
    def wrapper(
        file: Path,
        overlays: tuple[Path, ...],
        sets: tuple[str, ...],
        set_strings: tuple[str, ...],
        chart: Path | None,
        **others: Any,
    ) -> Any:
        return command(sources=Sources((file, *overlays), sets, chart, set_strings), **others)

    return decorated(
        wrapper,
        click.argument("file", type=click.Path(path_type=Path)),
        path("-f", "--values", "overlays", metavar="FILE", multiple=True, help="Lay another inputs file over FILE."),
        click.option(
            "--set",
            "sets",
            metavar="KEY=VALUE",
            multiple=True,
            help="Change keys, in Helm's syntax: --set lora.r=8,lora.targetModules={q_proj,v_proj}.",
        ),
        click.option(
            "--set-string", "set_strings", metavar="KEY=VALUE", multiple=True, help="The same; the value is text."
        ),
        chart_option,
    )


def decorated(command: Command, *decorators: Callable[[Command], Command]) -> Command:
    """As if they stood above the command, in this order."""
    for decorate in reversed(decorators):
        command = decorate(command)
    return command
