"""What a user writes: the keys of an inputs file. What is left out is chosen by genvalues, or has its default.

The blocks that the stages read are declared in ``run``; here stand only the keys that exist in no other file, and those
that may be left out because the planner chooses them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from genvalues.accelerators.instances import CPU, NAMES, default_backend
from genvalues.settings.base import DIGEST, DNS_LABEL, HUB_ID, LARGE, REPOSITORY, REVISION, TAG, Block, Text
from genvalues.settings.run import (
    ActivationCheckpointing,
    Attention,
    Backend,
    Compile,
    DatasetOptions,
    EvaluationEnabled,
    EvaluationOptions,
    Format,
    GradientAccumulationSteps,
    Lora,
    Monitoring,
    Nodes,
    PerDeviceBatchSize,
    Probe,
    Processes,
    Publish,
    RehearseEnabled,
    ShardSize,
    Source,
    TensorParallelSize,
    TrainingOptions,
    Verify,
)
from genvalues.settings.shared import (
    ExistingClaim,
    FileSystem,
    GuardOptions,
    Size,
    StallTimeout,
    StorageClass,
    StorageKind,
    TokenKey,
    TokenSecret,
)
from genvalues.settings.values import Kueue, Workload

SCHEMA = Path(__file__).with_name("inputs.schema.json")
MODEL_ID = rf"^{HUB_ID}(@{REVISION})?$"
IMAGE = rf"^{REPOSITORY}(:{TAG})?(@{DIGEST})?$"


class ModelPath(Block):
    """A model on a disk."""

    path: Text = Field(description="Folder of a Hugging Face snapshot, or a .gguf file.")


class DatasetInputs(DatasetOptions):
    source: Annotated[Source, Field(min_length=1)]
    format: Format | None = Field(
        None, description="What a row of the dataset is. Left out: text for .txt, else instruction."
    )


class Cpu(Block):
    """Settings of instance: cpu."""

    processes: Processes = 2


class TrainingInputs(TrainingOptions):
    attention: Attention | None = None
    activation_checkpointing: ActivationCheckpointing | None = None
    per_device_batch_size: PerDeviceBatchSize | None = None
    gradient_accumulation_steps: GradientAccumulationSteps | None = None
    global_batch_size: int | None = Field(
        None, ge=1, le=LARGE, description="Rows per optimizer step, over all copies of the model."
    )


class ParallelismInputs(Block):
    """What the layout must keep to. `genvalues plan` shows the layout and its reasons."""

    tensor_parallel_size: TensorParallelSize | None = None
    shard_size: ShardSize | None = None
    max_hours: float | None = Field(
        None,
        gt=0,
        le=100000,
        description="Choose the fewest nodes that compile and train within this estimated time. Only if nodes is "
        "left out.",
    )


class EvaluationInputs(EvaluationOptions):
    enabled: EvaluationEnabled | None = None


class RehearseInputs(Block):
    """The rehearse stage. Left out: enabled on Trainium."""

    enabled: RehearseEnabled | None = None


class GuardInputs(GuardOptions):
    stall_timeout: StallTimeout | None = None


class StorageInputs(Block):
    """The volume for models, datasets and runs."""

    kind: StorageKind | None = None
    size: Size | None = None
    storage_class: StorageClass | None = None
    existing_claim: ExistingClaim | None = None
    static: FileSystem | None = None


class HuggingFaceInputs(Block):
    """The Secret with the Hugging Face token for gated models."""

    token_secret: Annotated[TokenSecret, Field(min_length=1)] = "hf-token"
    token_key: TokenKey = "token"


class Inputs(Block):
    """An inputs file of genvalues: one LoRA fine-tune of a Llama model."""

    name: str = Field(
        "llama-lora",
        pattern=f"^{DNS_LABEL}$",
        max_length=53,
        description="Name of the run: a-z, 0-9 and hyphens.",
    )
    model: Annotated[str, Field(pattern=MODEL_ID, max_length=256)] | ModelPath = Field(
        description="Hub id, id@revision, or {path: /somewhere}."
    )
    dataset: DatasetInputs
    instance: Annotated[str, Field(json_schema_extra={"enum": [*NAMES]})] = Field(
        description="Instance type to train on, or cpu."
    )
    backend: Backend | None = Field(
        None,
        description="native: PyTorch on CPUs, and by TorchNeuron on Trn2 and later. xla: optimum-neuron on PyTorch/XLA"
        ". Left out: native for cpu and trn2, xla for trn1. cpu and neuron are their older names.",
    )
    workload: Workload = "pytorchjob"
    nodes: Nodes | None = Field(
        None, description="Nodes that compile and train. Left out: 1, or as many as parallelism.maxHours needs."
    )
    parallelism: ParallelismInputs = ParallelismInputs()
    cpu: Cpu | None = None
    lora: Lora = Lora()
    training: TrainingInputs = TrainingInputs()
    probe: Probe = Probe()
    compile: Compile = Compile()
    rehearse: RehearseInputs = RehearseInputs()
    evaluation: EvaluationInputs = EvaluationInputs()
    publish: Publish = Publish()
    monitoring: Monitoring = Monitoring()
    verify: Verify = "cached"
    guards: GuardInputs = GuardInputs()
    storage: StorageInputs = StorageInputs()
    kueue: Kueue = Kueue()
    hugging_face: HuggingFaceInputs | None = Field(
        None,
        description="The Secret with the Hugging Face token for gated models; null: no token. Left out: {tokenSecret: "
        "hf-token, tokenKey: token} on Trainium, null on cpu.",
    )
    image: str | None = Field(
        None,
        pattern=IMAGE,
        max_length=512,
        description="Image of the stages, with tag or digest. Required unless instance is cpu.",
    )
    mode: Literal["attached", "detached"] | None = Field(
        None,
        description="attached: the Helm client waits for the stages. detached: a runner in the cluster does. Left out: "
        "detached on Trainium, attached on cpu.",
    )
    chart_values: dict[str, Any] = Field({}, description="Any other values of the chart. Merged last.")

    @property
    def on_cpu(self) -> bool:
        return self.instance == CPU

    @property
    def chosen_backend(self) -> str:
        """The backend of the inputs, or else that of the instance type."""
        return self.backend or default_backend(self.instance)

    @property
    def evaluates(self) -> bool:
        """Whether the evaluate stage runs; left out: if there are held-out examples."""
        enabled = self.evaluation.enabled
        return self.dataset.holds_out if enabled is None else enabled

    @property
    def rehearses(self) -> bool:
        """Whether the rehearse stage runs; left out: on Trainium."""
        return not self.on_cpu if self.rehearse.enabled is None else self.rehearse.enabled


def inputs_from(written: dict[str, Any]) -> Inputs:
    """The inputs of a file that the JSON schema accepts."""
    inputs = Inputs.model_validate(written)
    if "huggingFace" not in written and not inputs.on_cpu:  # most base models are gated
        inputs = inputs.model_copy(update={"hugging_face": HuggingFaceInputs()})
    return inputs
