"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from genvalues.common.text import one_line
from genvalues.inputs.input_options import Sources

Command = Callable[..., Any]


def path(*arguments: str, **settings: Any) -> Callable[[Command], Command]:
    return click.option(*arguments, type=click.Path(path_type=Path), **settings)


chart_option = path("--chart", metavar="DIR", help="The chart's folder. Default: ./chart, else the source tree's.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document to stdout, for programs.")
namespace_option = click.option(
    "-n", "--namespace", envvar="HELM_NAMESPACE", help="The release's namespace. Default: the context's."
)
context_option = click.option(
    "--kube-context", "context", envvar="HELM_KUBECONTEXT", help="The cluster. Default: the current context."
)


def inputs(command: Command) -> Command:
    """Add FILE, -f, --set, --set-string and --chart; the command receives them as one argument, ``sources``."""

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
        path(
            "-f",
            "--values",
            "overlays",
            metavar="FILE",
            multiple=True,
            help="Merge another inputs file over FILE. Repeatable.",
        ),
        click.option(
            "--set",
            "sets",
            metavar="KEY=VALUE",
            multiple=True,
            help="Set keys, in Helm's syntax: --set lora.r=8,lora.targetModules={q_proj,v_proj}.",
        ),
        click.option(
            "--set-string",
            "set_strings",
            metavar="KEY=VALUE",
            multiple=True,
            help="Like --set, but the value is always text.",
        ),
        chart_option,
    )


def decorated(command: Command, *decorators: Callable[[Command], Command]) -> Command:
    """Apply the decorators in order, the first outermost."""
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


def no_problems_in(sources: Sources) -> str:
    """``No problems found in base.yaml and trn2.yaml.``"""
    *others, last = (one_line(str(file), 200) for file in sources.files)
    names = f"{', '.join(others)} and {last}" if others else last
    return f"No problems found in {names}."
