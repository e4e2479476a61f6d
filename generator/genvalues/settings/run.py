"""The settings of a run: blocks of the chart's values that the stages read, and most of them what a user writes.

The chart puts these blocks whole into the run config (a ConfigMap), which the trainer reads as ``RunConfig``. Where
genvalues chooses a value that the inputs leave out, the type and description stand in an alias, which
``inputs`` uses for the key that may be left out and this module for the key that has a value.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from genvalues.common.dicts import get, merge
from genvalues.settings.base import (
    DNS_NAME,
    HUB_ID,
    LARGE,
    REVISION,
    RUN_NAME,
    Block,
    Fraction,
    NullIsEmpty,
    Number,
    OtherWords,
    Text,
    optional,
    other_words,
)
from genvalues.settings.datasets import BUCKET, SPLIT

TargetModule = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RowFormat = Literal["text", "instruction", "prompt-completion", "chat"]

# What release 0.1 called the backends and the kinds of attention.
OLDER_BACKENDS = {"cpu": "native", "neuron": "xla"}
OLDER_ATTENTION = {"eager": "isolated", "flash": "causal"}

DeviceType = Literal["cpu", "neuron", "cuda"]

TRAIN_GRACE_SECONDS = 120  # to save a checkpoint; the gate reserves its cost, cleanup waits for it

SOURCE_NAME = r"^[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*$"  # shown in messages and reports

# --- keys that genvalues chooses when the inputs leave them out

Source = Annotated[
    str,
    Field(
        max_length=1024,
        description="Hub id, or path or s3:// URI of a file (.jsonl .ndjson .json .csv .tsv .parquet .txt, also .gz or "
        ".zst), a folder (s3://BUCKET/PREFIX/) or a glob. In a cluster an absolute path under workspace.mountPath.",
    ),
]
Format = Annotated[RowFormat, Field(description="What a row of the dataset is.")]
Backend = Annotated[
    Literal["native", "xla"],
    OtherWords(OLDER_BACKENDS),
    Field(
        description="native: PyTorch on CPUs, and by TorchNeuron on Trn2 and later. xla: optimum-neuron on PyTorch/XLA "
        "for Trn1, and for Trn2 with images of Neuron SDK 2.29 or older. cpu and neuron are their older names.",
    ),
]
Attention = Annotated[
    Literal["isolated", "causal", "isolatedFlash"],
    OtherWords(OLDER_ATTENTION),
    Field(
        description="isolated keeps packed examples apart. causal is Trainium's flash kernel: faster, less memory, "
        "but a packed example sees those before it in its row, so use it for format text. On Trainium it requires a "
        "maxSequenceLength that is a multiple of 512 (backend native) or 2048 (xla). isolatedFlash (backend xla) is "
        "the flash kernel with a mask that keeps packed examples apart; it has not run on Trainium yet, so genvalues "
        "never chooses it. eager and flash are older names of the first two.",
    ),
]
ActivationCheckpointing = Annotated[
    Literal["none", "selective", "full"],
    Field(
        description="What the backward pass recomputes to save memory: nothing, the attention (selective), or whole "
        "layers (full).",
    ),
]
PerDeviceBatchSize = Annotated[
    int, Field(ge=1, le=1024, description="Rows that each copy of the model processes at once.")
]
GradientAccumulationSteps = Annotated[int, Field(ge=1, le=65536, description="Batches per optimizer step.")]
TensorParallelSize = Annotated[
    int, Field(ge=1, le=1024, description="Processes that split each layer of one copy of the model.")
]
ShardSize = Annotated[
    int,
    Field(
        ge=1,
        le=1048576,
        description="Copies that share the base model's weights (FSDP2): each keeps 1 / shardSize of them, and gathers "
        "one layer at a time. A divisor of dataParallelSize. Backend xla: 1.",
    ),
]
Nodes = Annotated[int, Field(ge=1, le=1024, description="Nodes that compile and train.")]
Processes = Annotated[int, Field(ge=1, le=1024, description="Training processes on each node.")]
EvaluationEnabled = Annotated[
    bool,
    Field(
        description="Run the evaluate stage. Requires held-out rows (dataset.evalFraction above 0, or dataset.eval)."
    ),
]
Verify = Annotated[
    Literal["always", "cached", "off"],
    OtherWords({False: "off"}),  # as compile.mode
    Field(
        description="Whether stages check by SHA-256 that what they read is what an earlier stage wrote. cached: a "
        "file that has not changed since is hashed once on each node. always: in every stage. off: compare sizes only."
    ),
]
RehearseEnabled = Annotated[
    bool,
    Field(
        description="Run the rehearse stage: train, save and merge a model of 2 layers with the run's own settings and "
        "rows on a CPU node, before any Trainium node is requested."
    ),
]


Artifact = Literal["adapter", "merged", "report"]
# The bucket's name by the rules of S3; a prefix of characters that need no escaping anywhere.
S3_PREFIX = rf"s3://{BUCKET}(/[A-Za-z0-9_][A-Za-z0-9_.=-]*)+/?"
HubRepository = Annotated[
    str, Field(pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*)?$", max_length=96)
]
HOST = r"([^\s@?#/:\[\]]+|\[[0-9A-Fa-f:.]+\])"  # no @: credentials are in Secrets
PORT = "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
Url = Annotated[str, Field(pattern=optional(rf"https?://{HOST}(:{PORT})?(/[^\s@?#]*)?"), max_length=1024)]


class Model(Block):
    """The base model: id (and revision) of a Hugging Face Hub model, or path. One of the two is required."""

    id: str = Field(
        "", pattern=optional(HUB_ID), max_length=256, description="Hub id, such as meta-llama/Meta-Llama-3.1-8B."
    )
    revision: str = Field(
        "",
        pattern=optional(REVISION),
        max_length=256,
        description="Branch, tag or commit. Empty: the default branch. Resolved to a commit once and kept.",
    )
    path: str = Field(
        "", pattern="^(/|$)", max_length=1024, description="Absolute path of a model folder or a GGUF file."
    )


class Columns(Block):
    """Which column of the dataset holds what. A column left out has the name of its key."""

    text: Text | None = Field(None, description="Format text: the text.")
    instruction: Text | None = Field(None, description="Format instruction: the instruction.")
    input: Text | None = Field(None, description="Format instruction: additional input, optional.")
    output: Text | None = Field(None, description="Format instruction: the answer.")
    prompt: Text | None = Field(None, description="Format prompt-completion: the prompt.")
    completion: Text | None = Field(None, description="Format prompt-completion: the completion.")
    messages: Text | None = Field(None, description="Format chat: a list of {role, content}.")
    system: Text | None = Field(None, description="Formats instruction and chat: the system prompt, optional.")
    history: Text | None = Field(
        None, description="Format instruction: earlier turns, a list of [question, answer], optional."
    )
    tools: Text | None = Field(
        None, description="Formats chat and prompt-completion: the tools that the assistant may call, optional."
    )

    @model_serializer(mode="wrap")
    def only_named(self, dump: SerializerFunctionWrapHandler) -> dict[str, str]:
        return {key: column for key, column in dump(self).items() if column is not None}

    def named(self) -> dict[str, str]:
        """The columns that are named: key of the format -> column of the dataset."""
        return self.as_keys()


class DatasetLocation(Block):
    """Which rows of a source."""

    config: NullIsEmpty = Field("", max_length=1024, description="Configuration of a Hub dataset that has several.")
    revision: NullIsEmpty = Field(
        "",
        pattern=optional(REVISION),
        max_length=256,
        description="Branch, tag or commit of a Hub dataset. refs/convert/parquet is the Hub's copy in Parquet, for a "
        "dataset that a script reads.",
    )
    split: NullIsEmpty = Field(
        "",
        pattern=optional(SPLIT),
        max_length=1024,
        description="Split of a Hub dataset or a folder, or a part of it: train[:10%], train[1000:2000]. A file is the "
        "split train. Empty: train.",
    )


class DatasetPart(DatasetLocation):
    """A source of rows, and how often its rows are used."""

    FIRST: ClassVar[tuple[str, ...]] = ("source", "format")

    columns: Columns = Columns()
    weight: Number = Field(
        1.0,
        gt=0,
        le=1000,
        description="How often an epoch uses each row of the source that is not held out: 2 twice, 0.5 a random half.",
    )


class AdditionalSource(DatasetPart):
    """A further source of rows."""

    source: Annotated[Source, Field(min_length=1)]
    format: RowFormat | None = Field(None, description="What a row is. Left out: dataset.format.")


class HeldOut(DatasetLocation):
    """Where the held-out rows come from. source and split empty: evalFraction of the rows to train on.

    The rows have the format and the columns of dataset.source.
    """

    source: Source = Field("", description="Source of the held-out rows. Empty, with a split: dataset.source.")


class DatasetOptions(DatasetPart):
    """What to train on."""

    additional: dict[str, AdditionalSource] = Field(
        {},
        json_schema_extra={"propertyNames": {"pattern": SOURCE_NAME}},
        description="Further sources of rows, such as replay: {source: ..., weight: 0.5}, each by a name without / and "
        "without a dot at its beginning.",
    )
    eval_fraction: Fraction = Field(
        0.02, description="Share of the rows held out for evaluation. Without effect if dataset.eval is set."
    )
    eval: HeldOut = HeldOut()
    group_column: NullIsEmpty = Field(
        "",
        max_length=1024,
        description="Column whose equal values keep rows together: all of them are held out, or none.",
    )
    train_on: Literal["all-answers", "last-answer"] = Field(
        "all-answers",
        description="Which assistant turns of a conversation have a loss. A message with weight: 0, train: false or "
        "masked: true never has one.",
    )
    overlong: Literal["split", "truncate", "drop"] | None = Field(
        None,
        description="What becomes of an example longer than training.maxSequenceLength: split (format text) makes full "
        "pieces, truncate cuts off its end, drop omits it if a trained token would be lost. Left out: split for format "
        "text, else drop.",
    )
    max_dropped: float = Field(
        0.5, ge=0, le=1, description="Refuse a dataset if more than this share of its rows is dropped."
    )
    on_bad_row: Literal["fail", "skip"] = Field(
        "fail",
        description="fail lists the first 20 rows that cannot be read or lack a column, with their places. skip drops "
        "them.",
    )

    @property
    def holds_out(self) -> bool:
        """Whether there are rows to evaluate on."""
        return self.eval_fraction > 0 or self.holds_out_apart

    @property
    def holds_out_apart(self) -> bool:
        """Whether the held-out rows are not among those of the sources to train on."""
        return bool(self.eval.source or self.eval.split)


class Dataset(DatasetOptions):
    source: Source
    format: Format


class Lora(Block):
    """The LoRA adapter (arXiv:2106.09685): W + (alpha / r) B A on the target modules."""

    r: int = Field(16, ge=1, le=1024, description="Rank. A higher rank can learn more and takes more memory.")
    alpha: Number = Field(
        16.0, gt=0, le=65536, description="Scaling: the adapter's weights are multiplied by alpha / r."
    )
    dropout: Fraction = Field(0.05, description="Dropout on the adapter's input.")
    target_modules: (
        Literal["all-linear"]
        | Annotated[list[TargetModule], Field(min_length=1, json_schema_extra={"uniqueItems": True})]
    ) = Field(["q_proj", "v_proj"], description="Linear layers that get an adapter, or all-linear.")

    @field_validator("target_modules")
    @classmethod
    def in_order(cls, modules: list[str] | str) -> list[str] | str:
        """Their order means nothing, so it must not change a fingerprint."""
        return sorted(set(modules)) if isinstance(modules, list) else modules


class TrainingOptions(Block):
    """Training: batch sizes count rows of maxSequenceLength tokens, steps count optimizer steps.

    A step trains on perDeviceBatchSize * gradientAccumulationSteps * parallelism.dataParallelSize rows.
    """

    max_sequence_length: int = Field(
        2048, ge=8, le=131072, description="Tokens per row. dataset.overlong: what becomes of longer examples."
    )
    packing: bool = Field(True, description="Pack several examples into one row. They cannot attend to each other.")
    epochs: Number = Field(1.0, gt=0, le=10000, description="Passes over the dataset.")
    max_steps: int | None = Field(None, ge=1, le=LARGE, description="Optimizer steps. Overrides epochs.")
    learning_rate: float = Field(5e-5, gt=0, le=1, description="Peak learning rate, after warm-up.")
    lr_scheduler: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="Learning rate schedule after warm-up."
    )
    warmup_ratio: Fraction = Field(0.03, description="Share of the steps in which the learning rate rises.")
    weight_decay: Number = Field(0.0, ge=0, le=1, description="Weight decay of AdamW.")
    max_grad_norm: Number = Field(1.0, gt=0, le=1e6, description="Gradients are clipped to this norm.")
    save_steps: int = Field(
        100, ge=1, le=LARGE, description="Optimizer steps between checkpoints: the most that a lost node costs."
    )
    save_total_limit: int = Field(2, ge=1, le=1000, description="Checkpoints to keep.")
    eval_steps: int | None = Field(
        None,
        ge=1,
        le=LARGE,
        description="Optimizer steps between measurements of the held-out loss. It is also measured before the first "
        "step and after the last. Left out: never while training.",
    )
    eval_rows: int = Field(
        64,
        ge=1,
        le=LARGE,
        description="Held-out rows of each of these measurements: the first ones, the same each time.",
    )
    load_best_model_at_end: bool = Field(
        False,
        description="Continue with the checkpoint of the lowest held-out loss instead of the last one. It is saved "
        "when it is measured, and kept beside saveTotalLimit. Requires evalSteps.",
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        le=LARGE,
        description="End the training after so many measurements in a row that do not lower the held-out loss. "
        "Requires evalSteps.",
    )
    early_stopping_threshold: Number = Field(
        0.0,
        ge=0,
        le=1000,
        description="How much lower than the lowest before, in nats per trained token, the loss must be for "
        "earlyStoppingPatience.",
    )
    seed: int = Field(42, ge=0, le=2**32 - 1, description="Seed of shuffling, adapter initialization and dropout.")


# The fields of Training that say when to measure the held-out loss, and what depends on it.
EVALUATES = {
    "eval_steps",
    "eval_rows",
    "load_best_model_at_end",
    "early_stopping_patience",
    "early_stopping_threshold",
}


class Training(TrainingOptions):
    attention: Attention = "isolated"
    activation_checkpointing: ActivationCheckpointing = "selective"
    per_device_batch_size: PerDeviceBatchSize = 1
    gradient_accumulation_steps: GradientAccumulationSteps = 3

    @property
    def isolates_examples(self) -> bool:
        """Whether packed examples are kept apart; otherwise a row is one text."""
        return self.attention != "causal"

    @property
    def depends_on_held_out_loss(self) -> bool:
        """Whether the held-out loss decides which weights the training gives."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    def settings_of_result(self, exclude: set[str]) -> dict[str, Any]:
        """The settings for a fingerprint. Measuring the held-out loss is one only if something depends on it."""
        return self.model_dump(exclude=exclude | (set() if self.depends_on_held_out_loss else EVALUATES))


class Probe(Block):
    """The check of the saved weights. train records the loss of a few fixed rows at its last save; consolidate and
    merge recompute it on a CPU and refuse weights that are off.

    They read one decoder layer of the model at a time for it (5Gi for 8B parameters, 7Gi for 70B). With rows: 0 there
    is no check.
    """

    rows: int = Field(8, ge=0, le=10000, description="Rows to compute the loss of. 0: no check.")
    max_tokens: int = Field(512, ge=8, le=131072, description="Tokens of each row.")
    tolerance: float = Field(
        0.02, gt=0, le=100, description="Allowed difference, in nats per trained token, between two computations."
    )


class Compile(Block):
    """How graphs are compiled for Trainium."""

    mode: Annotated[
        Literal["layers", "off"],
        OtherWords({False: "off"}),  # Helm and other readers of YAML 1.1 take off for the boolean false
        Field(
            description="Backend native: compile each decoder layer (layers), or run operator by operator (off), which "
            "is slower and helps to find a fault. No effect on the CPU."
        ),
    ] = "layers"
    on_fallback: Literal["refuse", "warn"] = Field(
        "refuse",
        description="Backend native: what train does when an operator runs on the CPU because the device has none: end "
        "the run, or warn.",
    )
    # Not "on", which Helm and other readers of YAML 1.1 take for the boolean true.
    runs_on: Literal["accelerator", "cpu"] = Field(
        "accelerator",
        description="accelerator: compile on the nodes that train. cpu (backend xla): those nodes only collect the "
        "graphs, and a CPU pod compiles them.",
    )
    on_mismatch: Literal["refuse", "warn"] = Field(
        "refuse",
        description="What train does when the cache was made with other settings or versions: refuse to start, or warn "
        "and compile while training.",
    )


class EvaluationOptions(Block):
    """The evaluate stage: held-out loss and sample answers of the base and the merged model."""

    FIRST: ClassVar[tuple[str, ...]] = ("enabled",)

    max_rows: int = Field(256, ge=1, le=LARGE, description="Held-out rows to compute the loss on.")
    samples: int = Field(4, ge=0, le=1000, description="Answers to generate with each model.")
    max_new_tokens: int = Field(128, ge=1, le=131072, description="Maximum length of a generated answer, in tokens.")
    max_hours: Number = Field(
        2.0,
        ge=0,
        le=8760,
        description="How long the stage may take, by an estimate from its first rows: it uses fewer rows and samples, "
        "and the report says so. 0: no limit.",
    )


class Evaluation(EvaluationOptions):
    enabled: EvaluationEnabled = True

    def settings_of_result(self) -> dict[str, Any]:
        """The settings for a fingerprint. The default maxHours is not part of it: older runs have none."""
        written = self.as_keys()
        if self.max_hours == type(self).model_fields["max_hours"].default:
            del written["maxHours"]
        return written


class Parallelism(Block):
    """How the work is divided: nodes * processesPerNode must equal tensorParallelSize * dataParallelSize."""

    nodes: Nodes = 1
    processes_per_node: Processes = 2
    tensor_parallel_size: TensorParallelSize = 1
    data_parallel_size: int = Field(2, ge=1, le=1048576, description="Copies of the model, over all nodes.")
    shard_size: ShardSize = 1


class Rehearse(Block):
    """The rehearse stage: the run's own settings and rows, on a small model of the same architecture."""

    enabled: RehearseEnabled = False


class PublishToS3(Block):
    """A copy of the run's results in S3, with manifest.json last: names, sizes and SHA-256."""

    uri: str = Field(
        "",
        pattern=optional(S3_PREFIX),
        max_length=1024,
        description="s3://BUCKET/PREFIX of this run alone. Empty: no copy.",
    )
    artifacts: Annotated[list[Artifact], Field(min_length=1, json_schema_extra={"uniqueItems": True})] = Field(
        ["adapter", "merged", "report"],
        description="What to copy. The report exists only with evaluation.enabled.",
    )


class PublishToHub(Block):
    """Repositories of the Hugging Face Hub for the results, each written in one commit."""

    adapter: HubRepository = Field("", description="ORG/NAME of the adapter's repository. Empty: none.")
    merged: HubRepository = Field("", description="ORG/NAME of the merged model's repository. Empty: none.")
    private: bool = Field(
        True,
        description="Create private repositories, and refuse one that is public. false: create public ones.",
    )
    token_secret: str = Field(
        "",
        pattern=optional(DNS_NAME),
        max_length=253,
        description="Name of the Secret with a token that may write to them. Empty: huggingFace.tokenSecret.",
    )
    token_key: str = Field(
        "token", pattern=r"^[-._a-zA-Z0-9]+$", max_length=253, description="Key of the token in that Secret."
    )


class Publish(Block):
    """The publish stage, which uploads the results. It runs if publish.s3.uri or a repository of publish.hub is set."""

    s3: PublishToS3 = PublishToS3()
    hub: PublishToHub = PublishToHub()

    @property
    def enabled(self) -> bool:
        return bool(self.s3.uri or self.hub.adapter or self.hub.merged)


class Monitoring(Block):
    """Where the progress and metrics of the stages go besides the volume. None of it can slow or fail a stage."""

    pushgateway: Url = Field("", description="URL of a Prometheus Pushgateway. Empty: none.")
    otlp_endpoint: Url = Field(
        "", description="Base URL of an OpenTelemetry collector (OTLP over HTTP, often port 4318). Empty: none."
    )
    wandb: bool = Field(
        False,
        description="Log the training to Weights & Biases. Its variables, such as WANDB_MODE: stages.train.extraEnv.",
    )
    mlflow: bool = Field(
        False, description="Log the training to MLflow. Requires MLFLOW_TRACKING_URI in stages.train.extraEnv."
    )
    secret_name: str = Field(
        "",
        pattern=optional(DNS_NAME),
        max_length=253,
        description="Name of a Secret whose keys are variables with credentials: WANDB_API_KEY, MLFLOW_TRACKING_TOKEN, "
        "MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, OTEL_EXPORTER_OTLP_HEADERS, PUSHGATEWAY_USERNAME, "
        "PUSHGATEWAY_PASSWORD. Those that it lacks are not set.",
    )


class RunConfig(Block):
    """Everything a stage reads, as the chart's ConfigMap holds it."""

    name: Annotated[str, Field(pattern=f"^{RUN_NAME}$", max_length=63)]
    backend: Backend
    device: DeviceType = "cpu"  # the chart writes it, from the instance type
    model: Model
    dataset: Dataset
    lora: Lora = Lora()
    training: Training = Training()
    probe: Probe = Probe()
    compile: Compile = Compile()
    evaluation: Evaluation = Evaluation()
    parallelism: Parallelism = Parallelism()
    rehearse: Rehearse = Rehearse()
    publish: Publish = Publish()
    monitoring: Monitoring = Monitoring()
    verify: Verify = "cached"


def with_own_words(values: dict[str, Any]) -> dict[str, Any]:
    """Values with each key's own words where they have others: backend xla for neuron."""
    for key, words in other_words(RunConfig):
        *blocks, name = key.split(".")
        block = get(values, ".".join(blocks), dict) if blocks else values
        if block and (own := words.own(block.get(name))) != block.get(name):
            replaced: Any = own
            for part in reversed([*blocks, name]):
                replaced = {part: replaced}
            values = merge(values, replaced)
    return values
