"""The ``genvalues`` command. Its commands parse and print (genvalues.commands): data to stdout, messages to stderr.

The exit statuses are listed in its help. Where the reader of stdout has closed it, a command ends silently with 1.
"""

from __future__ import annotations

import contextlib
import os
import sys

import click

from genvalues import __version__
from genvalues.commands import Commands
from genvalues.common import log
from genvalues.common.boundary import is_full_stdout, report
from genvalues.common.errors import EXIT_FAILED, EXIT_VOLUME, user_errors_end_with_status_2
from genvalues.common.streams import open_closed_streams, say

EXIT_STATUS = """\b
Exit status:
    0    success
    2    the inputs, the command line, the cluster or AWS must be changed first
    1    any other failure: a stage failed, a service did not respond, an internal error
    130  interrupted by Ctrl-C; for another signal, 128 plus its number
"""


def show_version(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"genvalues {__version__}")
        ctx.exit()


@click.group(cls=Commands, epilog=EXIT_STATUS, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-v", "--verbose", is_flag=True, help="Show details, too. Goes before the command.")
@click.option("-q", "--quiet", is_flag=True, help="Show only warnings and errors. Goes before the command.")
@click.option(
    "--version", is_flag=True, callback=show_version, expose_value=False, is_eager=True, help="Show the version."
)
def genvalues(verbose: bool, quiet: bool) -> None:
    """Turn a short inputs file into checked values for the llama-lora chart, and run a LoRA fine-tune of Llama on AWS
    Trainium, or on this computer.
    """
    log.configure(verbose - quiet)


def main() -> None:
    """Entry point: every outcome ends in an exit status and, except for a closed stdout, a message."""
    open_closed_streams()
    try:
        try:
            sys.exit(run_command())
        finally:
            sys.stdout.flush()  # before Python exits, while an error can still be reported
    except BrokenPipeError:  # from our own prints; click handles its own
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - until the process ends
        sys.exit(1)
    except Exception as error:
        if is_full_stdout(error):
            say(f"stdout: cannot be written: {error.strerror}")
            sys.exit(EXIT_FAILED)
        status = report(error, "genvalues")
        sys.exit(EXIT_FAILED if status == EXIT_VOLUME else status)


@user_errors_end_with_status_2
def run_command() -> int:
    try:
        status = genvalues(standalone_mode=False)
    except click.ClickException as error:
        with contextlib.suppress(OSError):  # stderr cannot be written
            error.show()
        return error.exit_code
    except click.Abort as aborted:  # raised for Ctrl-C, and for the end of stdin at a prompt
        return 130 if isinstance(aborted.__cause__ or aborted.__context__, KeyboardInterrupt) else 1
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    main()
