"""What the user writes: the blocks of an inputs file, with the limits and the purpose of every key.

``python -m genvalues.settings.inputs_schema`` has pydantic make the JSON schema of them, which checks a file and
which an editor can use. What the schema has let through, ``inputs_from`` takes as it is.
"""

from __future__ import annotations

from dataclasses import MISSING as REQUIRED
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from genvalues.accelerators.instances import CPU, NAMES

SCHEMA = Path(__file__).with_name("inputs.schema.json")

DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
DNS_NAME = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
DURATION = r"^([0-9]{1,4}h)?([0-9]{1,5}m)?([0-9]{1,6}s)?$"
REVISION = r"[A-Za-z0-9_][A-Za-z0-9_./-]*"
HUB_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
MODEL_ID = rf"^{HUB_PART}(/{HUB_PART})?(@{REVISION})?$"
IMAGE_PART = r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?"
IMAGE = (
    rf"^{IMAGE_PART}(:[0-9]+)?(/{IMAGE_PART})*"
    r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?$"
)


class Limits:
    """Of one of the types that a key may have, in pydantic's words."""

    def __init__(self, **rules: Any) -> None:
        self.rules = rules


TargetModule = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Text = Annotated[str, Limits(min_length=1, max_length=1024)]
LARGE = 1_000_000_000  # an upper bound for what has no natural one


def setting(default: Any = REQUIRED, *, description: str, **limits: Any) -> Any:
    """A key: its default (none: it must be written), what it is for, and limits in pydantic's words."""
    metadata = {"description": description, **limits}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def block(kind: type, *default: Any, description: str) -> Any:
    """A key that holds a block; ``REQUIRED`` or None where it is not by itself one with every key left out."""
    metadata = {"description": description, "block": kind}
    return field(default=default[0], metadata=metadata) if default else field(default_factory=kind, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ModelPath:
    """A model that is already on a disk."""

    path: Text = setting(description="folder of a Hugging Face snapshot, or a .gguf file")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which column of the dataset holds what; a name left out is the key itself."""

    text: Text | None = setting(None, description="format text: the text")
    instruction: Text | None = setting(None, description="format instruction: what is asked")
    input: Text | None = setting(
        None, description="format instruction: what the question is about, where there is such"
    )
    output: Text | None = setting(None, description="format instruction: the answer")
    prompt: Text | None = setting(None, description="format prompt-completion: the prompt")
    completion: Text | None = setting(None, description="format prompt-completion: what the model shall say")
    messages: Text | None = setting(None, description="format chat: a list of {role, content}")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    source: Text = setting(description="hub id, s3:// URI, or a file: .jsonl .json .csv .parquet .txt")
    config: Text | None = setting(None, description="configuration of a hub dataset that has several")
    revision: str | None = setting(
        None, pattern=f"^{REVISION}$", max_length=256, description="branch, tag or commit of a hub dataset"
    )
    split: Text | None = setting(None, description="split of a hub dataset; train when left out")
    format: Literal["text", "instruction", "prompt-completion", "chat"] | None = setting(
        None, description="what a row is; text for .txt, else instruction, when left out"
    )
    columns: Columns = block(Columns, description="which column of the dataset holds what")
    eval_fraction: float = setting(0.02, ge=0, lt=1, description="share of the rows held out for evaluation")


@dataclass(frozen=True, kw_only=True)
class Cpu:
    processes: int = setting(2, ge=1, le=128, description="training processes on each node")


@dataclass(frozen=True, kw_only=True)
class Lora:
    r: int = setting(16, ge=1, le=1024, description="rank")
    alpha: int = setting(16, ge=1, le=65536, description="scaling: the adapter's weights count alpha / r")
    dropout: float = setting(0.05, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: (
        Literal["all-linear"]
        | Annotated[list[TargetModule], Limits(min_length=1, json_schema_extra={"uniqueItems": True})]
    ) = setting(["q_proj", "v_proj"], description="the linear layers that get an adapter, or all-linear")


@dataclass(frozen=True, kw_only=True)
class Training:
    max_sequence_length: int = setting(2048, ge=8, le=131072, description="tokens in a row")
    packing: bool = setting(True, description="several examples in a row, which cannot see each other")
    attention: Literal["eager", "flash"] | None = setting(
        None,
        description="eager keeps packed examples apart; flash is causal only, so that each sees those before it. flash "
        "for format text on Trainium where maxSequenceLength is a multiple of 2048, else eager, when left out",
    )
    activation_checkpointing: Literal["none", "selective", "full"] | None = setting(
        None,
        description="what is computed again in the backward pass: nothing, the attention, or whole layers. selective, "
        "or full where memory needs it, when left out",
    )
    per_device_batch_size: int | None = setting(
        None, ge=1, le=1024, description="rows that a copy of the model takes at once; chosen (1) when left out"
    )
    gradient_accumulation_steps: int | None = setting(
        None, ge=1, le=65536, description="how many times, before an optimizer step; chosen (3) when left out"
    )
    global_batch_size: int | None = setting(
        None,
        ge=1,
        le=LARGE,
        description="rows of an optimizer step, over all copies of the model; follows from the others when left out",
    )
    epochs: float = setting(1, gt=0, le=10000, description="times through the dataset")
    max_steps: int | None = setting(None, ge=1, le=LARGE, description="optimizer steps, instead of epochs")
    learning_rate: float = setting(5e-5, gt=0, le=1, description="highest learning rate")
    lr_scheduler: Literal["linear", "cosine", "constant"] = setting("linear", description="how it falls after warm-up")
    warmup_ratio: float = setting(0.03, ge=0, lt=1, description="share of the steps in which it rises")
    weight_decay: float = setting(0.0, ge=0, le=1, description="AdamW's weight decay")
    max_grad_norm: float = setting(1.0, gt=0, le=1e6, description="gradients are clipped to this norm")
    save_steps: int = setting(100, ge=1, le=LARGE, description="optimizer steps between checkpoints")
    save_total_limit: int = setting(2, ge=1, le=1000, description="checkpoints kept")
    seed: int = setting(42, ge=0, le=2**32 - 1, description="of shuffling, adapter and dropout")


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """Wishes; `genvalues plan` shows what is made of them, and what is chosen without."""

    tensor_parallel_size: int | None = setting(
        None, ge=1, le=1024, description="processes that share one copy of the model; chosen when left out"
    )
    max_hours: float | None = setting(
        None,
        gt=0,
        le=100000,
        description="the fewest nodes that compile and train within it by estimate, where nodes is left out",
    )


@dataclass(frozen=True, kw_only=True)
class Probe:
    rows: int = setting(8, ge=0, le=10000, description="how many rows; 0: no proof, and no model in memory for it")
    max_tokens: int = setting(512, ge=8, le=131072, description="tokens of each row")
    tolerance: float = setting(
        0.02, gt=0, le=100, description="nats per trained token by which two computations may differ"
    )


@dataclass(frozen=True, kw_only=True)
class Compile:
    # Not "on", which Helm and other readers of YAML 1.1 take for the boolean true.
    runs_on: Literal["accelerator", "cpu"] = setting(
        "accelerator",
        description="accelerator: on the nodes that train; cpu: those only collect the graphs, a CPU pod compiles them",
    )
    on_mismatch: Literal["refuse", "warn"] = setting(
        "refuse", description="what train does when the cache was made by other settings or versions"
    )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    enabled: bool | None = setting(
        None, description="true when rows are held out (dataset.evalFraction > 0), if left out"
    )
    max_rows: int = setting(256, ge=1, le=LARGE, description="held-out rows to measure the loss on")
    samples: int = setting(4, ge=0, le=1000, description="answers to generate, before and after")
    max_new_tokens: int = setting(128, ge=1, le=131072, description="length of a generated answer")


@dataclass(frozen=True, kw_only=True)
class Guards:
    max_cost: float | None = setting(
        None, gt=0, le=LARGE, description="dollars of the run's nodes at which it is stopped, with a checkpoint"
    )
    stall_timeout: str | None = setting(
        None,
        pattern=DURATION,
        max_length=32,
        description="train is stopped after so long without a step, such as 45m or 1h30m; empty: never. "
        "30m on Trainium, 2h with compile.onMismatch: warn, never on cpu, when left out",
    )
    price_per_node_hour: float | None = setting(
        None, gt=0, le=LARGE, description="dollars that a node costs an hour; the price list's, when left out"
    )


@dataclass(frozen=True, kw_only=True)
class FileSystem:
    """An FSx for Lustre file system that exists already."""

    file_system_id: str = setting(pattern=r"^fs-[0-9a-f]{8,40}$", description="such as fs-0123456789abcdef0")
    dns_name: str = setting(pattern=DNS_NAME, max_length=253, description="the file system's DNS name")
    mount_name: str = setting(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="the file system's mount name")


@dataclass(frozen=True, kw_only=True)
class Storage:
    kind: Literal["fsx", "fsx-static", "generic"] | None = setting(
        None,
        description="fsx: a new FSx for Lustre; fsx-static: one that exists; generic: any storage class. "
        "fsx on Trainium, generic on cpu, when left out",
    )
    size: str | None = setting(None, pattern=r"^[1-9][0-9]{0,6}(Mi|Gi|Ti)$", description="such as 1200Gi")
    storage_class: str | None = setting(
        None,
        pattern=rf"^$|{DNS_NAME}",
        max_length=253,
        description="of the claim; empty: the cluster's default",
    )
    existing_claim: str | None = setting(
        None,
        pattern=DNS_NAME,
        max_length=253,
        description="a PersistentVolumeClaim to use instead of making one",
    )
    static: FileSystem | None = block(FileSystem, None, description="the file system of kind fsx-static")


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    token_secret: str = setting(
        "hf-token", pattern=DNS_NAME, max_length=253, description="name of the Secret that holds the token"
    )
    token_key: str = setting(
        "token", pattern=r"^[-._a-zA-Z0-9]+$", max_length=253, description="the token's key in that Secret"
    )


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """An inputs file of genvalues: one LoRA fine-tune of a Llama."""

    name: str = setting(
        "llama-lora", pattern=DNS_LABEL, max_length=53, description="the run's name: a-z, 0-9 and hyphens"
    )
    model: Annotated[str, Limits(pattern=MODEL_ID, max_length=256)] | ModelPath = block(
        ModelPath, REQUIRED, description="hub id, id@revision, or {path: /somewhere}"
    )
    dataset: Dataset = block(Dataset, REQUIRED, description="what to train on")
    instance: str = setting(json_schema_extra={"enum": [*NAMES]}, description="instance type to train on, or cpu")
    nodes: int | None = setting(
        None, ge=1, le=1024, description="nodes to train on; 1, or what parallelism.maxHours needs, when left out"
    )
    parallelism: Parallelism = block(Parallelism, description="how the nodes share the work")
    cpu: Cpu | None = block(Cpu, None, description="instance cpu only")
    lora: Lora = block(Lora, description="the adapter")
    training: Training = block(Training, description="the run")
    probe: Probe = block(
        Probe,
        description="the proof of the weights: a loss of fixed rows, recorded by train and computed again by "
        "consolidate and merge",
    )
    compile: Compile = block(Compile, description="how Trainium's graphs are compiled")
    evaluation: Evaluation = block(Evaluation, description="base and tuned model, side by side")
    guards: Guards = block(Guards, description="limits on what a run costs, and on standing still")
    storage: Storage = block(Storage, description="the volume that holds models, datasets and runs")
    hugging_face: HuggingFace | None = block(
        HuggingFace,
        None,
        description="where the token for gated models is; null when none is needed. "
        "{tokenSecret: hf-token, tokenKey: token} on Trainium, null on cpu, when left out",
    )
    image: str | None = setting(
        None,
        pattern=IMAGE,
        max_length=512,
        description="the image of the stages, by tag or digest; needed unless cpu",
    )
    mode: Literal["attached", "detached"] | None = setting(
        None,
        description="attached: the Helm client waits for the stages; detached: a runner in the cluster does. "
        "detached on Trainium, attached on cpu, when left out",
    )
    chart_values: dict[str, Any] = setting({}, description="merged last into the values, for whatever the chart offers")

    @property
    def on_cpu(self) -> bool:
        return self.instance == CPU


Kind = TypeVar("Kind")


def inputs_from(written: dict[str, Any]) -> Inputs:
    """The inputs of a file that the schema has let through."""
    inputs = built(Inputs, written)
    if "huggingFace" not in written and not inputs.on_cpu:  # models are gated as a rule
        inputs = replace(inputs, hugging_face=HuggingFace())
    return inputs


def built(kind: type[Kind], written: dict[str, Any]) -> Kind:
    """A block with what was written in it; numbers of the key's own type, as JSON Schema takes 16.0 for an integer."""
    values: dict[str, Any] = {}
    for setting in fields(kind):  # type: ignore[arg-type]
        key = camel(setting.name)
        if key not in written:
            continue
        value, inner = written[key], setting.metadata.get("block")
        if inner and isinstance(value, dict):
            value = built(inner, value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            value = float(value) if str(setting.type).startswith("float") else int(value)
        values[setting.name] = value
    return kind(**values)


def plain(block: Any) -> dict[str, Any]:
    """A block as keys and values, none left out."""
    values = {camel(setting.name): getattr(block, setting.name) for setting in fields(block)}
    return {key: plain(value) if is_dataclass(value) else value for key, value in values.items()}


def camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(other.title() for other in others)
