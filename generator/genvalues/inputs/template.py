"""The first inputs file of `genvalues init`: the answers, and every other key, commented out, with its default."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genvalues.accelerators.instances import CPU, default_backend
from genvalues.common.errors import UserError, UserErrors, write_errors_as_user_errors
from genvalues.common.files import place_of, write_named
from genvalues.common.text import KeyPath, one_line
from genvalues.inputs.chart import BESIDE_THE_SOURCES, NAME, chart_name
from genvalues.inputs.check import check
from genvalues.inputs.document import Document, Position
from genvalues.inputs.generated_file import schema_comments
from genvalues.inputs.schema_lookup import inputs_schema
from genvalues.inputs.yaml_text import dump
from genvalues.settings.datasets import REQUIRED_COLUMNS, row_format
from genvalues.settings.inputs import SCHEMA

MODEL = "meta-llama/Meta-Llama-3.1-8B"
DATASET = "databricks/databricks-dolly-15k"
# 123456789012 is the example account of AWS documentation: check warns until it is replaced.
IMAGE = "123456789012.dkr.ecr.us-west-2.amazonaws.com/llama-lora:0.1.0"
COLUMNS_OF = {DATASET: {"instruction": "instruction", "input": "context", "output": "response"}}
WRITTEN_OUT = ("lora", "training")  # the blocks that users change first
TRIED_FIRST = ("maxSequenceLength", "perDeviceBatchSize", "gradientAccumulationSteps", "epochs", "learningRate")
# Examples of keys without a default in the schema.
EXAMPLES: dict[str, Any] = {
    "cpu": {"processes": 2},
    "huggingFace": {"tokenSecret": "hf-token", "tokenKey": "token"},
    "storage": {"kind": "fsx", "size": "1200Gi", "storageClass": "fsx-sc"},
    "mode": "detached",
    "rehearse": {"enabled": True},
}
ON_CPU: dict[str, Any] = {
    "storage": {"kind": "generic", "size": "100Gi"},
    "mode": "attached",
    "rehearse": {"enabled": False},
    "huggingFace": None,
    "image": IMAGE,
}


@dataclass(frozen=True)
class Answers:
    """Answers given to init. ``image`` is None where no pod needs one."""

    model: str = MODEL
    dataset: str = DATASET
    format: str | None = None
    instance: str = "ml.trn1.32xlarge"
    nodes: int = 1
    image: str | None = None
    name: str = "llama-lora"

    @property
    def inputs(self) -> dict[str, Any]:
        """The answers as keys of an inputs file."""
        format_ = self.format or row_format(None, self.dataset)
        dataset: dict[str, Any] = {"source": self.dataset, "format": format_}
        if self.dataset in COLUMNS_OF and format_ == "instruction":
            dataset["columns"] = COLUMNS_OF[self.dataset]
        inputs = {"name": self.name, "model": self.model, "dataset": dataset, "instance": self.instance}
        image = {} if self.instance == CPU and self.image is None else {"image": self.image or IMAGE}
        return {**inputs, "nodes": self.nodes, **image}


def check_answers(answers: Answers, file: Path) -> None:
    """Raises UserErrors with every error in the answers, placed at the options that give them."""
    document = Document(file)
    document.value = answers.inputs
    given: dict[KeyPath, str] = {
        ("name",): f"--name {answers.name}",
        ("model",): f"--model {answers.model}",
        ("dataset", "source"): f"--dataset {answers.dataset}",
        ("dataset", "format"): f"--format {answers.format or row_format(None, answers.dataset)}",
        ("instance",): f"--instance {answers.instance}",
        ("nodes",): f"--nodes {answers.nodes}",
        ("image",): f"--image {answers.image or IMAGE}",
    }
    keys = {**given, ("dataset",): given["dataset", "source"]}
    for order, (key, flag) in enumerate(keys.items()):
        document.positions[key] = Position(0, order, 0, one_line(flag), file.parent)
    check(document)


def mistakes(answers: Answers, file: Path) -> list[UserError]:
    """The errors in the answers. ``option_of`` names the option of each."""
    try:
        check_answers(answers, file)
    except UserError as error:
        return error.errors if isinstance(error, UserErrors) else [error]
    return []


def option_of(error: UserError) -> str:
    """The option of an error of ``mistakes``, without its dashes."""
    return error.where.split(" ")[0].removeprefix("--")


def template_text(answers: Answers, file: Path) -> str:
    """The text of the inputs file to write to ``file``."""
    inputs = answers.inputs
    tree = BESIDE_THE_SOURCES.parent if chart_name(BESIDE_THE_SOURCES) == NAME else None
    name = one_line(file.name)
    head = [
        "Inputs of genvalues. A key that is commented out has the value that is shown.",
        f"    genvalues check {name}      checks it",
        f"    genvalues preview {name}    shows rows as the model sees them",
        f"    genvalues write {name}      writes the values of the chart",
        *schema_comments(SCHEMA, tree, file.parent, "genvalues schema"),
    ]
    sections = ["\n".join(f"# {line}" for line in head) + "\n"]
    properties = inputs_schema()["properties"]
    for key, rules in properties.items():
        if key == CPU and answers.instance != CPU:
            continue
        purpose = "".join(f"# {line}\n" for line in textwrap.wrap(rules["description"], 98))
        sections.append(purpose + section(key, inputs, answers.instance == CPU))
    return "\n".join(sections)


def section(key: str, inputs: dict[str, Any], on_cpu: bool) -> str:
    """One top-level key: the answer, or its defaults, commented out unless users often change them."""
    if key == "dataset":
        return dataset_section(inputs["dataset"])
    if key in inputs:
        return dump({key: inputs[key]})
    shown = ON_CPU[key] if on_cpu and key in ON_CPU else EXAMPLES.get(key, default_of(key))
    if key == "backend":
        shown = default_backend(inputs["instance"])
    if key in WRITTEN_OUT:
        keys = shown if key != "training" else {name: shown[name] for name in TRIED_FIRST if name in shown}
        return f"{key}:\n" + "".join(f"  {in_a_line(name, value)}\n" for name, value in keys.items())
    return f"# {in_a_line(key, shown)}\n"


def dataset_section(dataset: dict[str, Any]) -> str:
    lines = [in_a_line(name, value) for name, value in dataset.items()]
    if "columns" not in dataset:
        columns = {name: name for name in REQUIRED_COLUMNS[dataset["format"]]}
        lines.append(f"# {in_a_line('columns', columns)}")
    lines.append("# evalFraction: 0.02")
    return "dataset:\n" + "".join(f"  {line}\n" for line in lines)


def default_of(key: str) -> Any:
    """The default of a key; of a block, without keys that are null."""
    default = inputs_schema()["properties"][key].get("default")
    if isinstance(default, dict):
        return {name: value for name, value in default.items() if value is not None} or default
    return default


def in_a_line(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{key}: {{{', '.join(in_a_line(name, inner) for name, inner in value.items())}}}"
    if isinstance(value, list):
        return f"{key}: [{', '.join(value)}]"
    return dump({key: value}).strip()


def check_place(file: Path, *, force: bool) -> None:
    """Raises UserError if the file cannot be written, before any question is asked."""
    with write_errors_as_user_errors(str(file)):
        if file.is_dir():
            raise UserError("is a directory", where=str(file), fix=f"Name a file: {file / 'finetune.yaml'}.")
        if file.exists() and not (force and file.is_file()):
            raise UserError("already exists", where=str(file), fix="Name another file, or overwrite it with --force.")
        place_of(file)


def write_starter(file: Path, text: str, *, force: bool) -> None:
    """Write a new file. Overwrites an existing one only with ``force``."""
    check_place(file, force=force)
    with write_errors_as_user_errors(str(file)):
        write_named(file, text.encode("utf-8"))
