"""The `llama-lora` command: a command per stage, `fingerprint`, `verify`. They parse and print; work is elsewhere."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from pathlib import Path

import click

from genvalues.common import log, manifests
from genvalues.common.errors import UserError, user_errors_end_with_status_2, write_errors_as_user_errors
from llama_lora import config as run_config
from llama_lora import environment as environment  # sets what torch reads when it is imported
from llama_lora import stage, stopping
from llama_lora.paths import Paths

config_option = click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="The run config the chart renders (run.yaml)."
)
workspace_option = click.option(
    "--workspace",
    type=click.Path(path_type=Path),
    envvar="LLAMA_LORA_WORKSPACE",
    help="The volume of models, datasets and runs. [env: LLAMA_LORA_WORKSPACE]",
)


def load(config_file: Path | None, workspace: Path | None) -> tuple[run_config.RunConfig, Paths]:
    """The run config and its workspace. Raises UserError where either is not given."""
    if config_file is None:
        raise UserError("no run config", where="--config", fix="Pass --config run.yaml.")
    if workspace is None:
        raise UserError("no workspace", where="--workspace", fix="Pass --workspace DIR or set LLAMA_LORA_WORKSPACE.")
    config = run_config.load(config_file)
    return config, Paths(workspace.absolute(), config.name)


def make_run_folder(paths: Paths) -> None:
    """Raises UserError where the workspace is not to be written to."""
    with write_errors_as_user_errors(f"--workspace {paths.workspace}", "Give a folder you may write to."):
        paths.run.mkdir(parents=True, exist_ok=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="llama-lora")
def main() -> None:
    """The stages of a LoRA fine-tune, one command each. Exit status: 0 done, 2 change something, else try again."""
    log.configure()


@main.command()
@click.argument("name", metavar="STAGE", type=click.Choice(stage.names()))
@config_option
@workspace_option
@user_errors_end_with_status_2
def fingerprint(name: str, config_file: Path | None, workspace: Path | None) -> None:
    """Print whether STAGE is up to date, as JSON. Runs nothing."""
    config, paths = load(config_file, workspace)
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
@user_errors_end_with_status_2
def verify(name: str, config_file: Path | None, workspace: Path | None) -> None:
    """Check what STAGE wrote: every file there, with the size and SHA-256 that its manifest names. Writes nothing."""
    click.echo(stage.verify(name, *load(config_file, workspace)))


def stage_command(declared: stage.Declaration) -> click.Command:
    """A stage's command: in a run with --config, or alone with the options its tool has (all of them)."""
    tool_options = list(inspect.signature(declared.tool).parameters) if declared.tool else []

    @user_errors_end_with_status_2
    def command(config_file: Path | None, workspace: Path | None, **alone: Path | None) -> None:
        if importlib.util.find_spec("torch") is None:
            needed = "pip install 'llama-lora[trainer]'"
            raise UserError("torch is not installed", fix=f"Install what the stages need: {needed}.")
        stopping.end_when_told()
        given = [name for name in tool_options if alone[name] is not None]
        if not given:
            config, paths = load(config_file, workspace)
            make_run_folder(paths)
            stage.run(declared.name, config, paths)
            if not sys.stdout.isatty() and (line := manifests.line_of(paths.manifest(declared.name))):
                click.echo(line)  # for a pod's log; on a terminal it is a long line, of a file that is here
            return
        if config_file is not None or given != tool_options:
            together = " ".join(f"--{name} DIR" for name in tool_options)
            raise UserError(
                "takes a run config or folders", where=declared.name, fix=f"Pass --config run.yaml, or {together}."
            )
        assert declared.tool is not None
        declared.tool(**alone)

    for name in reversed(tool_options):
        command = click.option(f"--{name}", type=click.Path(path_type=Path), help="Alone, with no run config.")(command)
    return click.command(declared.name, help=declared.summary)(config_option(workspace_option(command)))


for stage_name in stage.names():
    main.add_command(stage_command(stage.declaration(stage_name)))
