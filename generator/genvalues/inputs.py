"""What the user writes: the model of an inputs file.

``python -m genvalues.inputs`` writes the JSON schema that checks a file (see check.py) and that an editor can use.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from genvalues.files import write_text
from genvalues.instances import CPU, NAMES

SCHEMA = Path(__file__).with_name("inputs.schema.json")

DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
DNS_NAME = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
REVISION = r"[A-Za-z0-9_][A-Za-z0-9_./-]*"
HUB_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
MODEL_ID = rf"^{HUB_PART}(/{HUB_PART})?(@{REVISION})?$"
IMAGE_PART = r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?"
IMAGE = (
    rf"^{IMAGE_PART}(:[0-9]+)?(/{IMAGE_PART})*"
    r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?$"
)

TargetModule = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Text = Annotated[str, Field(min_length=1, max_length=1024)]
LARGE = 1_000_000_000  # an upper bound for what has no natural one


class Block(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)


class ModelPath(Block):
    """A model that is already on a disk."""

    path: Text = Field(description="folder of a Hugging Face snapshot, or a .gguf file")


class Columns(Block):
    """Which column of the dataset holds what; a name left out is the key itself."""

    text: Text | None = Field(default=None, description="format text: the text")
    instruction: Text | None = Field(default=None, description="format instruction: what is asked")
    input: Text | None = Field(
        default=None, description="format instruction: what the question is about, where there is such"
    )
    output: Text | None = Field(default=None, description="format instruction: the answer")
    prompt: Text | None = Field(default=None, description="format prompt-completion: the prompt")
    completion: Text | None = Field(default=None, description="format prompt-completion: what the model shall say")
    messages: Text | None = Field(default=None, description="format chat: a list of {role, content}")


class Dataset(Block):
    source: Text = Field(description="hub id, s3:// URI, or a file: .jsonl .json .csv .parquet .txt")
    config: Text | None = Field(default=None, description="configuration of a hub dataset that has several")
    revision: str | None = Field(
        default=None, pattern=f"^{REVISION}$", max_length=256, description="branch, tag or commit of a hub dataset"
    )
    split: Text | None = Field(default=None, description="split of a hub dataset; train when left out")
    format: Literal["text", "instruction", "prompt-completion", "chat"] | None = Field(
        default=None, description="what a row is; text for .txt, else instruction, when left out"
    )
    columns: Columns = Field(default=Columns(), description="which column of the dataset holds what")
    eval_fraction: float = Field(default=0.02, ge=0, lt=1, description="share of the rows held out for evaluation")


class Cpu(Block):
    processes: int = Field(default=2, ge=1, le=128, description="training processes on each node")


class Lora(Block):
    r: int = Field(default=16, ge=1, le=1024, description="rank")
    alpha: int = Field(default=16, ge=1, le=65536, description="scaling: the adapter's weights count alpha / r")
    dropout: float = Field(default=0.05, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: (
        Literal["all-linear"]
        | Annotated[list[TargetModule], Field(min_length=1, json_schema_extra={"uniqueItems": True})]
    ) = Field(default=["q_proj", "v_proj"], description="the linear layers that get an adapter, or all-linear")


class Training(Block):
    max_sequence_length: int = Field(default=2048, ge=8, le=131072, description="tokens in a row")
    packing: bool = Field(default=True, description="several examples in a row, which cannot see each other")
    attention: Literal["eager", "flash"] | None = Field(
        default=None,
        description="eager keeps packed examples apart; flash is causal only, so that each sees those before it. flash "
        "for format text on Trainium where maxSequenceLength is a multiple of 2048, else eager, when left out",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        default="selective",
        description="what is computed again in the backward pass: nothing, the attention, or whole layers",
    )
    per_device_batch_size: int = Field(default=1, ge=1, le=1024, description="rows a data-parallel rank takes at once")
    gradient_accumulation_steps: int = Field(default=3, ge=1, le=65536, description="batches to an optimizer step")
    epochs: float = Field(default=1, gt=0, le=10000, description="times through the dataset")
    max_steps: int | None = Field(default=None, ge=1, le=LARGE, description="optimizer steps, instead of epochs")
    learning_rate: float = Field(default=5e-5, gt=0, le=1, description="highest learning rate")
    lr_scheduler: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="how it falls after warm-up"
    )
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1, description="share of the steps in which it rises")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="AdamW's weight decay")
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e6, description="gradients are clipped to this norm")
    save_steps: int = Field(default=100, ge=1, le=LARGE, description="optimizer steps between checkpoints")
    save_total_limit: int = Field(default=2, ge=1, le=1000, description="checkpoints kept")
    seed: int = Field(default=42, ge=0, le=2**32 - 1, description="of shuffling, adapter and dropout")


class Probe(Block):
    rows: int = Field(
        default=8, ge=0, le=10000, description="how many rows; 0: no proof, and no model in memory for it"
    )
    max_tokens: int = Field(default=512, ge=8, le=131072, description="tokens of each row")
    tolerance: float = Field(
        default=0.02, gt=0, le=100, description="nats per trained token by which two computations may differ"
    )


class Compile(Block):
    # Not "on", which Helm and other readers of YAML 1.1 take for the boolean true.
    runs_on: Literal["accelerator", "cpu"] = Field(
        default="accelerator",
        description="accelerator: on the nodes that train; cpu: those only collect the graphs, a CPU pod compiles them",
    )
    on_mismatch: Literal["refuse", "warn"] = Field(
        default="refuse", description="what train does when the cache was made by other settings or versions"
    )


class Evaluation(Block):
    enabled: bool | None = Field(
        default=None, description="true when rows are held out (dataset.evalFraction > 0), if left out"
    )
    max_rows: int = Field(default=256, ge=1, le=LARGE, description="held-out rows to measure the loss on")
    samples: int = Field(default=4, ge=0, le=1000, description="answers to generate, before and after")
    max_new_tokens: int = Field(default=128, ge=1, le=131072, description="length of a generated answer")


class FileSystem(Block):
    """An FSx for Lustre file system that exists already."""

    file_system_id: str = Field(pattern=r"^fs-[0-9a-f]{8,40}$", description="such as fs-0123456789abcdef0")
    dns_name: str = Field(pattern=DNS_NAME, max_length=253, description="the file system's DNS name")
    mount_name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="the file system's mount name")


class Storage(Block):
    kind: Literal["fsx", "fsx-static", "generic"] | None = Field(
        default=None,
        description="fsx: a new FSx for Lustre; fsx-static: one that exists; generic: any storage class. "
        "fsx on Trainium, generic on cpu, when left out",
    )
    size: str | None = Field(default=None, pattern=r"^[1-9][0-9]{0,6}(Mi|Gi|Ti)$", description="such as 1200Gi")
    storage_class: str | None = Field(
        default=None,
        pattern=rf"^$|{DNS_NAME}",
        max_length=253,
        description="of the claim; empty: the cluster's default",
    )
    existing_claim: str | None = Field(
        default=None,
        pattern=DNS_NAME,
        max_length=253,
        description="a PersistentVolumeClaim to use instead of making one",
    )
    static: FileSystem | None = Field(default=None, description="the file system of kind fsx-static")


class HuggingFace(Block):
    token_secret: str = Field(
        "hf-token", pattern=DNS_NAME, max_length=253, description="name of the Secret that holds the token"
    )
    token_key: str = Field(
        "token", pattern=r"^[-._a-zA-Z0-9]+$", max_length=253, description="the token's key in that Secret"
    )


class Inputs(Block):
    """An inputs file of genvalues: one LoRA fine-tune of a Llama."""

    name: str = Field(
        default="llama-lora", pattern=DNS_LABEL, max_length=53, description="the run's name: a-z, 0-9 and hyphens"
    )
    model: Annotated[str, Field(pattern=MODEL_ID, max_length=256)] | ModelPath = Field(
        description="hub id, id@revision, or {path: /somewhere}"
    )
    dataset: Dataset = Field(description="what to train on")
    instance: str = Field(json_schema_extra={"enum": [*NAMES]}, description="instance type to train on, or cpu")
    nodes: int = Field(default=1, ge=1, le=1024, description="nodes to train on")
    cpu: Cpu | None = Field(default=None, description="instance cpu only")
    lora: Lora = Field(default=Lora(), description="the adapter")
    training: Training = Field(default=Training(), description="the run")
    probe: Probe = Field(
        default=Probe(),
        description="the proof of the weights: a loss of fixed rows, recorded by train and computed again by "
        "consolidate and merge",
    )
    compile: Compile = Field(default=Compile(), description="how Trainium's graphs are compiled")
    evaluation: Evaluation = Field(default=Evaluation(), description="base and tuned model, side by side")
    storage: Storage = Field(default=Storage(), description="the volume that holds models, datasets and runs")
    hugging_face: HuggingFace | None = Field(
        default=None,
        description="where the token for gated models is; null when none is needed. "
        "{tokenSecret: hf-token, tokenKey: token} on Trainium, null on cpu, when left out",
    )
    image: str | None = Field(
        default=None,
        pattern=IMAGE,
        max_length=512,
        description="the image of the stages, by tag or digest; needed unless cpu",
    )
    mode: Literal["attached", "detached"] | None = Field(
        default=None,
        description="attached: the Helm client waits for the stages; detached: a runner in the cluster does. "
        "detached on Trainium, attached on cpu, when left out",
    )
    chart_values: dict[str, Any] = Field(
        default={}, description="merged last into the values, for whatever the chart offers"
    )

    @property
    def on_cpu(self) -> bool:
        return self.instance == CPU


def json_schema() -> dict[str, Any]:
    """The JSON schema of an inputs file."""
    schema = Inputs.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **without_titles(schema)}


def without_titles(schema: Any) -> Any:
    """Pydantic titles every key with its own name, which says nothing."""
    if isinstance(schema, list):
        return [without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: without_titles(value) for key, value in schema.items() if not (key == "title" and isinstance(value, str))
    }


def schema_text() -> str:
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    write_text(SCHEMA, schema_text())
