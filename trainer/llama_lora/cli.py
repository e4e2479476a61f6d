"""The ``llama-lora`` command: one command per stage, and fingerprint, verify, report, preview and acceptance."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from genvalues.common import log, manifests
from genvalues.common.boundary import is_full_stdout, report
from genvalues.common.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_VOLUME,
    Unavailable,
    UserError,
    VolumeError,
    in_pod,
    write_errors_as_user_errors,
)
from genvalues.common.streams import open_closed_streams
from genvalues.common.system_errors import AGAIN, causes, explain, explained, is_of_volume
from genvalues.common.text import has_surrogate, one_line
from genvalues.settings.dataset_files import CHAINED, is_chained
from llama_lora import config as run_config
from llama_lora import environment as environment  # sets the variables that torch reads at import
from llama_lora import forks, room, stage
from llama_lora.backends import stopping
from llama_lora.monitoring import observed
from llama_lora.paths import Paths

config_option = click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="The run config that the chart renders (run.yaml)."
)
workspace_option = click.option(
    "--workspace",
    type=click.Path(path_type=Path),
    envvar="LLAMA_LORA_WORKSPACE",
    help="The folder with models, datasets and runs. [env: LLAMA_LORA_WORKSPACE]",
)


# A retry makes sense once somebody has made room. Kubernetes' own pause before the first is 10 s.
PAUSE_IN_POD = 60.0  # seconds

PACKAGE = "llama_lora"
INSTALLED = "/site-packages/"  # in the path of a library's module
Command = TypeVar("Command", bound=Callable[..., Any])


def errors_end_in_one_line(command: Command) -> Command:
    """Decorate a command: every error ends in one line and an exit status. See genvalues.common.boundary."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):  # click's own, which it prints
            raise
        except KeyboardInterrupt:
            sys.exit(EXIT_INTERRUPTED)
        except Exception as error:
            # Before Python 3.12 an import that ends in __set_name__, by SIGTERM too, is a RuntimeError.
            for each in causes(error):
                if isinstance(each, (SystemExit, KeyboardInterrupt)):
                    sys.exit(each.code if isinstance(each, SystemExit) else EXIT_INTERRUPTED)
            status = report(full_stdout(error) or failed_import(error) or error, "llama-lora")
            if status == EXIT_VOLUME and in_pod():
                logging.getLogger(__name__).info(f"ending in {PAUSE_IN_POD:.0f} s, so that a retry comes after a pause")
                time.sleep(PAUSE_IN_POD)
            sys.exit(status)

    return wrapper  # type: ignore[return-value]


def full_stdout(error: Exception) -> VolumeError | None:
    """The error to report for one of printing to a file on a full volume: it has no path."""
    if not is_full_stdout(error):
        return None
    return VolumeError(f"stdout: cannot be written: {error.strerror}. Redirect it to a volume with room, {AGAIN}.")


def failed_import(error: Exception) -> UserError | None:
    """The error to report for one in importing a library, of any type: a variable that it reads, or what it needs."""
    if isinstance(error, (UserError, Unavailable, VolumeError)) or explain(error) is not None:
        return None
    library = next((name for each in causes(error) if (name := imported_library(each))), "")
    if not library:
        return None
    text = str(error).strip().partition("\n")[0]
    names = " and ".join(environment.variables_in(text, "HF_", "TORCH", "PYTORCH_", "TRANSFORMERS_", "TOKENIZERS_"))
    if names:
        fix = f"Check the environment variable {names}."
    else:
        fix = "Check the installation, the limit of memory (ulimit -v), and the environment variables HF_* and TORCH_*."
    what = f"cannot be imported: {type(error).__name__}: {one_line(environment.without_passwords(text), 300)}"
    return UserError(what, where=library, fix=fix)


def imported_library(error: BaseException) -> str:
    """The library that was being imported when the error was raised: code of a module ran; empty if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = max((place for place, frame in enumerate(frames) if PACKAGE in Path(frame.filename).parts), default=-1)
    modules = [frame.filename for frame in frames[own + 1 :] if frame.name == "<module>"]
    libraries = [Path(name.rpartition(INSTALLED)[2]).parts[0] for name in modules if INSTALLED in name]
    missing = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    return libraries[-1] if libraries else missing if missing != PACKAGE else ""


class Commands(click.Group):
    """The commands. Errors of click itself, in printing a help, end in one line too."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        open_closed_streams()
        if options.get("standalone_mode") is False:
            return errors_end_in_one_line(super().main)(*arguments, **options)
        return errors_end_in_one_line(self.run_to_exit)(*arguments, **options)

    def run_to_exit(self, *arguments: Any, **options: Any) -> None:
        options["standalone_mode"] = False  # click's own way to exit fails where stderr cannot be written
        try:
            status = super().main(*arguments, **options)
        except click.ClickException as error:
            with contextlib.suppress(OSError):  # stderr cannot be written
                error.show()
            sys.exit(error.exit_code)
        except click.Abort:
            sys.exit(EXIT_FAILED)
        sys.exit(status if isinstance(status, int) else 0)


def load_run(config_file: Path | None, workspace: Path | None) -> tuple[run_config.RunConfig, Paths]:
    """Load the run config and its workspace. Raises UserError if either option is missing."""
    if config_file is None:
        raise UserError("no run config", where="--config", fix="Pass --config run.yaml.")
    if workspace is None:
        raise UserError("no workspace", where="--workspace", fix="Pass --workspace DIR or set LLAMA_LORA_WORKSPACE.")
    config = run_config.load(config_file)
    check_utf_8("workspace", workspace)
    if is_chained(workspace):
        raise UserError(f"{CHAINED}: {workspace.absolute()}", where="--workspace", fix="Rename the folder.")
    paths = Paths(workspace.absolute(), config.name)
    if links := paths.links():
        raise UserError("is a symbolic link", where=str(links[0]), fix="Delete it: a run writes only to its workspace.")
    return config, paths


def check_utf_8(option: str, folder: Path) -> None:
    """Raise UserError for a folder whose path is not UTF-8, which the libraries cannot open."""
    if has_surrogate(str(folder.absolute())):
        raise UserError(f"{folder.absolute()} is not UTF-8", where=f"--{option}", fix="Rename the folder.")


def make_run_folder(paths: Paths) -> None:
    """Create the run's folder. Raises UserError if the workspace is not writable."""
    with write_errors_as_user_errors(f"--workspace {paths.workspace}", "Pass a writable folder."):
        try:
            paths.run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if is_of_volume(error):
                raise explain(error) or error from None
            raise


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="llama-lora")
@click.option("-v", "--verbose", is_flag=True, help="Log details too.")
@click.option("-q", "--quiet", is_flag=True, help="Log warnings and errors only.")
def main(verbose: bool, quiet: bool) -> None:
    """Run a stage of a LoRA fine-tune. Exit status: 0 done, 2 the user must change something, 75 the volume is
    full or fails (retry after a pause), other: retry."""
    if verbose or quiet:
        os.environ[environment.VERBOSITY] = "1" if verbose else "-1"  # for the worker processes
    log.configure(environment.verbosity())


@main.command()
@click.argument("name", metavar="STAGE", type=click.Choice(stage.names()))
@config_option
@workspace_option
@errors_end_in_one_line
def fingerprint(name: str, config_file: Path | None, workspace: Path | None) -> None:
    """Print as JSON whether STAGE is up to date. Runs nothing."""
    config, paths = load_run(config_file, workspace)
    asked = stage.Stage(name, config, paths)
    answer = {
        "stage": name,
        "fingerprint": asked.fingerprint,
        "upToDate": asked.is_done(),
        "manifest": str(paths.manifest(name)),
        "progress": str(paths.progress),
    }
    click.echo(json.dumps(answer))


@main.command()
@click.argument("name", metavar="STAGE", type=click.Choice(stage.names()))
@config_option
@workspace_option
@errors_end_in_one_line
def verify(name: str, config_file: Path | None, workspace: Path | None) -> None:
    """Check that every output of STAGE has the size and SHA-256 in its manifest. Writes nothing."""
    click.echo(stage.verify_outputs(name, *load_run(config_file, workspace)))


@main.command(name="report", short_help="Print the run's report.html into a pod's log.")
@config_option
@workspace_option
@errors_end_in_one_line
def report_command(config_file: Path | None, workspace: Path | None) -> None:
    """Print the run's report.html, compressed and in short lines, for `genvalues report` to read from a pod's log."""
    from llama_lora.report.verified import report_lines

    click.echo("\n".join(report_lines(*load_run(config_file, workspace))))


@main.command(name="acceptance", short_help="Check a device with a few steps of a run.")
@config_option
@workspace_option
@errors_end_in_one_line
def acceptance_command(config_file: Path | None, workspace: Path | None) -> None:
    """Train a few steps of a run on its device, and print PASS, FAIL or SKIP for each check (docs/neuron.md).

    Run it on every node of the run. It changes nothing of the run and writes acceptance.json into its folder.
    Exit status: 0 nothing failed, 1 a check failed, 2 the user must change something.
    """
    require_torch()
    stopping.exit_on_sigterm()
    from llama_lora.acceptance import acceptance
    from llama_lora.acceptance_checks import passed

    config, paths = load_run(config_file, workspace)
    found = []
    for check in acceptance(config, paths):
        click.echo(str(check))
        found.append(check)
    click.echo(f"written to {paths.acceptance}")
    if not passed(found):
        sys.exit(1)


@main.command(name="preview", short_help="Show the first rows as the model sees them.")
@config_option
@click.option(
    "--rows",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    help="How many examples of each source to show.",
)
@errors_end_in_one_line
def preview_command(config_file: Path | None, rows: int) -> None:
    """Show the first rows of the dataset as the model sees them, with what is trained. Needs no workspace.

    Reads the first 1,000 rows of each source, and no weights of the model.
    """
    require_torch()
    from llama_lora import preview

    if config_file is None:
        raise UserError("no run config", where="--config", fix="Pass --config run.yaml.")
    color = preview.wants_color()
    for line in preview.lines(preview.preview(run_config.load(config_file), rows), color=color):
        click.echo(line, color=color)


@main.command(name="fork-server", hidden=True)
def fork_server() -> None:
    """Run stages as forks of this process: llama_lora/forks.py."""
    arguments = forks.serve(has_work)
    forks.run_to_exit(lambda: main(arguments, prog_name="llama-lora"))


def has_work(arguments: Sequence[str]) -> bool:
    """Whether the stage of a command is not done, as far as is known before it starts.

    False on Neuron devices, whose libraries use them when they are imported.
    """
    name, *options = arguments
    try:
        given = main.commands[name].make_context(name, options).params
        config, paths = load_run(given["config_file"], given["workspace"])
        return config.device != "neuron" and not stage.Stage(name, config, paths).is_done()
    except Exception:  # which the stage reports
        return False


def require_torch() -> None:
    """Raise UserError if the trainer's libraries are not installed."""
    if importlib.util.find_spec("torch") is None:
        needed = "pip install 'llama-lora[trainer]'"
        raise UserError("torch is not installed", fix=f"Install what the stages need: {needed}.")


def stage_command(declared: stage.Declaration) -> click.Command:
    """Build the command of a stage. It runs with --config, or, if the stage has a tool, with all options of that."""
    tool_options = list(inspect.signature(declared.tool).parameters) if declared.tool else []

    @errors_end_in_one_line
    def command(config_file: Path | None, workspace: Path | None, **folders: Path | None) -> None:
        require_torch()
        stopping.exit_on_sigterm()
        given = [name for name in tool_options if folders[name] is not None]
        if not given:
            config, paths = load_run(config_file, workspace)
            make_run_folder(paths)
            needed = functools.partial(room.describe, declared.name, config, paths)
            with observed(declared.name, config, paths) as begin, explained(paths.run, needed):
                stage.run_stage(declared.name, config, paths, begin)
            if not sys.stdout.isatty() and (line := manifests.line_of(paths.manifest(declared.name))):
                click.echo(line)  # for pod logs (genvalues bundle); on a terminal it is only a long line
            return
        if config_file is not None or given != tool_options:
            together = " ".join(f"--{name} DIR" for name in tool_options)
            raise UserError(
                "takes either a run config or all folders",
                where=declared.name,
                fix=f"Pass --config run.yaml, or {together}.",
            )
        assert declared.tool is not None
        for name, folder in folders.items():
            check_utf_8(name, folder or Path())
        with explained(folders["output"] or Path()):
            declared.tool(**folders)

    for name in reversed(tool_options):
        command = click.option(f"--{name}", type=click.Path(path_type=Path), help="For use without a run config.")(
            command
        )
    return click.command(declared.name, help=declared.summary, short_help=declared.summary)(
        config_option(workspace_option(command))
    )


for stage_name in stage.names():
    main.add_command(stage_command(stage.declaration(stage_name)))


if __name__ == "__main__":
    main()
