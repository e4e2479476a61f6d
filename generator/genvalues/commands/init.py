from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command(short_help="Write a first inputs file, with every key explained.")
@click.argument("file", type=click.Path(path_type=Path), default="finetune.yaml")
@click.option("--model", metavar="ID", help="A hub id, or id@revision.")
@click.option("--dataset", metavar="SOURCE", help="A hub id, s3://bucket/key, or a file.")
@click.option("--format", "format_", metavar="FORMAT", help="text, instruction, prompt-completion or chat.")
@click.option("--instance", metavar="TYPE", help="The instance type to train on, such as ml.trn1.32xlarge, or cpu.")
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
    from genvalues.instances import CPU, refusal
    from genvalues.starter import IMAGE, Answers, check_answers, starter, usual_format, write_starter

    usual = Answers()
    ask = not yes and sys.stdin is not None and sys.stdin.isatty()

    def answer(given: str | None, question: str, default: str) -> str:
        if given is not None or not ask:
            return given if given is not None else default
        return str(click.prompt(question, default=default, err=True))

    model = answer(model, "Model (hub id)", usual.model)
    dataset = answer(dataset, "Dataset (hub id, s3://bucket/key, or a file)", usual.dataset)
    format_ = answer(format_, "Format (text, instruction, prompt-completion, chat)", usual_format(dataset))
    instance = answer(instance, "Instance type, or cpu", usual.instance)
    if nodes is None:
        several = ask and instance != CPU and refusal(instance, 2) is None
        nodes = click.prompt("Nodes", default=usual.nodes, err=True) if several else usual.nodes
    if image is None and ask and instance != CPU:
        image = click.prompt("Image (docs/image.md says how to build it)", default=IMAGE, err=True)
    name = answer(name, "Name of the run", usual.name)
    answers = Answers(model, dataset, format_, instance, nodes, image, name)
    check_answers(answers, file)
    write_starter(file, starter(answers, file), force=force)
    click.echo(f"Wrote {file}. Next: genvalues check {file}", err=True)
