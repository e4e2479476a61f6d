"""The command genvalues. Its commands parse and print (genvalues.commands); data goes to stdout, talk to stderr.

Exit status: 0 done, 2 the user must change something, 1 anything else; `local` ends as its first failing stage does.
Stopped by a signal, `image`, `install` and `local` end with 128 and its number (130: Ctrl-C).
"""

from __future__ import annotations

import click

from genvalues import __version__
from genvalues.commands import Commands
from genvalues.errors import user_errors_end_with_status_2


def show_version(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"genvalues {__version__}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, callback=show_version, expose_value=False, is_eager=True, help="Show the version."
)
def genvalues() -> None:
    """From a short inputs file to a LoRA fine-tune of Llama on Trainium: checked values for the chart llama-lora."""


@user_errors_end_with_status_2
def main() -> None:
    genvalues()


if __name__ == "__main__":
    main()
