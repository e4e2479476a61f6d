from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click


def formats_beginning_with(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from genvalues.settings.datasets import REQUIRED_COLUMNS

    return [name for name in REQUIRED_COLUMNS if name.startswith(incomplete)]


def instances_beginning_with(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from genvalues.accelerators.instances import NAMES

    return [name for name in NAMES if name.startswith(incomplete)]


@click.command(short_help="Write a first inputs file, with every key explained.")
@click.argument("file", type=click.Path(path_type=Path), default="finetune.yaml")
@click.option("--model", metavar="ID", help="A hub id, or id@revision.")
@click.option("--dataset", metavar="SOURCE", help="A hub id, s3://bucket/key, or a file.")
@click.option(
    "--format",
    "format_",
    metavar="FORMAT",
    shell_complete=formats_beginning_with,
    help="text, instruction, prompt-completion or chat.",
)
@click.option(
    "--instance",
    metavar="TYPE",
    shell_complete=instances_beginning_with,
    help="The instance type to train on, such as ml.trn1.32xlarge, or cpu.",
)
@click.option("--nodes", type=int, metavar="COUNT", help="How many of them.")
@click.option("--image", metavar="IMAGE", help="The stages' image, by tag or digest.")
@click.option("--name", metavar="NAME", help="The run's name.")
@click.option("-y", "--yes", is_flag=True, help="Ask nothing: what is not given gets what is usual.")
@click.option("--force", is_flag=True, help="Over a file that is there, too.")
def init(
    file: Path,
    model: str | None,
    dataset: str | None,
    format_: str | None,
    instance: str | None,
    nodes: int | None,
    image: str | None,
    name: str | None,
    yes: bool,
    force: bool,
) -> None:
    """Write a first inputs file, FILE (finetune.yaml), with every key explained.

    What is not given by an option is asked for, where there is somebody to ask.

    \b
    Example:
        genvalues init --model meta-llama/Llama-3.2-1B --dataset ./rows.jsonl --instance cpu
    """
    from dataclasses import replace

    from genvalues.accelerators.instances import CPU, refusal
    from genvalues.common.errors import UserErrors
    from genvalues.inputs.template import (
        IMAGE,
        Answers,
        check_answers,
        check_place,
        mistakes,
        option_of,
        template_text,
        usual_format,
        write_starter,
    )

    check_place(file, force=force)
    usual = Answers()
    options = {
        **{"model": model, "dataset": dataset, "format": format_, "instance": instance},
        **{"nodes": nodes, "image": image, "name": name},
    }
    given: dict[str, Any] = {field: value for field, value in options.items() if value is not None}
    ask = not yes and sys.stdin is not None and sys.stdin.isatty()
    # Until the instance is told, what would be right on the CPU is not refused: it has the fewest rules.
    at_first: dict[str, Any] = {"instance": CPU} if ask else {}
    answers = Answers(**{**at_first, **given})
    check_answers(answers, file)

    def answered(field: str, question: str, default: Any) -> Answers:
        def right(text: Any) -> Any:
            value: Any = click.INT.convert(text, None, None) if field == "nodes" else text
            trial = replace(answers, **{field: value})
            wrong = [error for error in mistakes(trial, file) if option_of(error) == field]
            if wrong:
                raise click.UsageError("\n".join(f"{error.what}. {error.fix}".strip() for error in wrong))
            return trial

        found: Answers = click.prompt(question, default=default, err=True, value_proc=right)
        return found

    to_ask = [field for field in options if field not in given] if ask else []
    while to_ask:
        if "model" in to_ask:
            answers = answered("model", "Model (hub id)", usual.model)
        if "dataset" in to_ask:
            answers = answered("dataset", "Dataset (hub id, s3://bucket/key, or a file)", usual.dataset)
        if "format" in to_ask:
            question = "Format (text, instruction, prompt-completion, chat)"
            answers = answered("format", question, usual_format(answers.dataset))
        if "instance" in to_ask:
            answers = answered("instance", "Instance type, or cpu", usual.instance)
        if "nodes" in to_ask and answers.instance != CPU and refusal(answers.instance, 2) is None:
            answers = answered("nodes", "Nodes", usual.nodes)
        if "image" in to_ask and answers.instance != CPU:
            answers = answered("image", "Image (docs/image.md says how to build it)", IMAGE)
        if "name" in to_ask:
            answers = answered("name", "Name of the run", usual.name)
        # What each is right in by itself may not fit together: such as a file here, and an instance in the cloud.
        wrong = mistakes(answers, file)
        to_ask = [field for field in options if field in map(option_of, wrong)]
        if wrong and not to_ask:
            raise UserErrors(wrong)
        for error in wrong:
            click.echo(str(error), err=True)
    write_starter(file, template_text(answers, file), force=force)
    click.echo(f"Wrote {file}. Next: genvalues check {file}", err=True)
