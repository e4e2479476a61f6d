from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from genvalues.inputs.template import Answers

log = logging.getLogger(__name__)

FIELDS = ("model", "dataset", "format", "instance", "nodes", "image", "name")  # in the order of the prompts


def complete_format(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from genvalues.settings.datasets import REQUIRED_COLUMNS

    return [name for name in REQUIRED_COLUMNS if name.startswith(incomplete)]


def complete_instance(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from genvalues.accelerators.instances import NAMES

    return [name for name in NAMES if name.startswith(incomplete)]


@click.command(short_help="Write a first inputs file that explains every key.")
@click.argument("file", type=click.Path(path_type=Path), default="finetune.yaml")
@click.option("--model", metavar="ID", help="A Hub id, or id@revision.")
@click.option("--dataset", metavar="SOURCE", help="A Hub id, s3://bucket/key, or a file.")
@click.option(
    "--format",
    "format_",
    metavar="FORMAT",
    shell_complete=complete_format,
    help="text, instruction, prompt-completion or chat.",
)
@click.option(
    "--instance",
    metavar="TYPE",
    shell_complete=complete_instance,
    help="The instance type to train on, such as ml.trn1.32xlarge, or cpu.",
)
@click.option("--nodes", type=int, metavar="COUNT", help="The number of instances.")
@click.option("--image", metavar="IMAGE", help="The stages' image, by tag or digest.")
@click.option("--name", metavar="NAME", help="The run's name.")
@click.option("-y", "--yes", is_flag=True, help="Do not prompt: use the defaults for options not given.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
def init(file: Path, format_: str | None, yes: bool, force: bool, **options: Any) -> None:
    """Write a first inputs file, FILE (finetune.yaml), that explains every key.

    On a terminal, it prompts for the options that are not given.

    \b
    Example:
        genvalues init --model meta-llama/Llama-3.2-1B --dataset ./rows.jsonl --instance cpu
    """
    from genvalues.accelerators.instances import CPU
    from genvalues.inputs.template import Answers, check_answers, check_place, template_text, write_starter

    check_place(file, force=force)
    given = {name: value for name, value in {**options, "format": format_}.items() if value is not None}
    prompts = not yes and sys.stdin is not None and sys.stdin.isatty()
    # Before the instance is known, check answers against the rules for the CPU, which are the fewest.
    defaults: dict[str, Any] = {"instance": CPU} if prompts else {}
    answers = Answers(**{**defaults, **given})
    check_answers(answers, file)
    if prompts:
        answers = prompt_for([name for name in FIELDS if name not in given], answers, file)
    write_starter(file, template_text(answers, file), force=force)
    log.info("Wrote %s. Next: genvalues check %s", file, file)


def prompt_for(fields: list[str], answers: Answers, file: Path) -> Answers:
    """Prompt for the fields until the answers have no errors, each alone and all together.

    Raises UserErrors where the errors are not in a field that can be prompted for.
    """
    from genvalues.common.errors import UserErrors
    from genvalues.inputs.template import mistakes, option_of

    while fields:
        for field in FIELDS:
            if field in fields:
                answers = prompt(field, answers, file)
        # Answers that are valid alone may not fit together, such as a local file and an instance in the cloud.
        errors = mistakes(answers, file)
        fields = [field for field in FIELDS if field in map(option_of, errors)]
        if errors and not fields:
            raise UserErrors(errors)
        for error in errors:
            click.echo(str(error), err=True)
    return answers


def prompt(field: str, answers: Answers, file: Path) -> Answers:
    """Prompt for one field, until its value is valid. The answers are returned unchanged where it does not apply."""
    from dataclasses import replace

    from genvalues.accelerators.instances import CPU, refusal
    from genvalues.inputs.template import IMAGE, mistakes, option_of
    from genvalues.inputs.template import Answers as Defaults
    from genvalues.settings.datasets import row_format

    if field in ("nodes", "image") and answers.instance == CPU:
        return answers
    if field == "nodes" and refusal(answers.instance, 2) is not None:  # this type trains on one node only
        return answers
    question = {
        "model": "Model (Hub id)",
        "dataset": "Dataset (Hub id, s3://bucket/key, or a file)",
        "format": "Format (text, instruction, prompt-completion, chat)",
        "instance": "Instance type, or cpu",
        "nodes": "Nodes",
        "image": "Image (docs/image.md explains how to build it)",
        "name": "Name of the run",
    }[field]
    default = {"format": row_format(None, answers.dataset), "image": IMAGE}.get(field) or getattr(Defaults(), field)

    def validated(text: Any) -> Answers:
        value: Any = click.INT.convert(text, None, None) if field == "nodes" else text
        trial = replace(answers, **{field: value})
        errors = [error for error in mistakes(trial, file) if option_of(error) == field]
        if errors:
            raise click.UsageError("\n".join(f"{error.what}. {error.fix}".strip() for error in errors))
        return trial

    found: Answers = click.prompt(question, default=default, err=True, value_proc=validated)
    return found
