"""The command genvalues. Its commands parse and print (genvalues.commands); data goes to stdout, talk to stderr.

The exit statuses are in the help. Where nobody reads its output any more, a command ends with 1 and without a word.
"""

from __future__ import annotations

import errno
import os
import sys

import click

from genvalues import __version__
from genvalues.commands import Commands
from genvalues.common.errors import defect, traceback_wanted, user_errors_end_with_status_2
from genvalues.common.log import configure

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, the user's share of it, the file's limit


def show_version(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"genvalues {__version__}")
        ctx.exit()


EXIT_STATUS = """\b
Exit status:
    0    done
    2    something in the inputs, the command line, the cluster or AWS must be changed first
    1    anything else: a stage has failed, a service does not answer, a defect of ours
    130  stopped by Ctrl-C; by another signal, 128 and its number
"""


@click.group(cls=Commands, epilog=EXIT_STATUS, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, callback=show_version, expose_value=False, is_eager=True, help="Show the version."
)
def genvalues() -> None:
    """From a short inputs file to a LoRA fine-tune of Llama on Trainium: checked values for the chart llama-lora."""
    configure()


def main() -> None:
    """The entry point: whatever happens ends in a status and, where there is something to say, in a message."""
    try:
        try:
            sys.exit(command())
        finally:
            if sys.stdout:  # which may be closed
                sys.stdout.flush()  # here, where a failure can be told
    except BrokenPipeError:  # in what is printed here; click takes care of the rest
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - until the process ends
        sys.exit(1)
    except Exception as error:
        told = not_written(error) if isinstance(error, OSError) else ""
        print(told or defect(error, with_traceback=traceback_wanted()), file=sys.stderr)
        sys.exit(1)


def not_written(error: OSError) -> str:
    """The line for a full disk, which is no defect; empty for any other error."""
    import traceback

    if error.errno not in FULL:
        return ""
    innermost = traceback.extract_tb(error.__traceback__)[-1].name
    where = "stdout" if innermost in ("main", click.echo.__name__) else error.filename or "stdout, or a file"
    return f"{where}: cannot be written: {error.strerror}"


@user_errors_end_with_status_2
def command() -> int:
    try:
        status = genvalues(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort as aborted:  # click's word for Ctrl-C, and for the end of the input at a question
        return 130 if isinstance(aborted.__cause__ or aborted.__context__, KeyboardInterrupt) else 1
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    main()
