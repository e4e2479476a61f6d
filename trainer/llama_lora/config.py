"""The run config: what a stage reads. The chart renders it into a ConfigMap, with the camelCase keys of its values."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.alias_generators import to_camel

from genvalues.common.errors import UserError, UserErrors


class Section(BaseModel):
    """A block of the run config; camelCase outside, snake_case inside; unknown keys are mistakes."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True, populate_by_name=True)

    def as_keys(self) -> dict[str, Any]:
        """The section as the user writes it, for fingerprints and records."""
        return self.model_dump(by_alias=True)


class Model(Section):
    """The base model: a hub id (with a revision or not), or a folder or GGUF file."""

    id: str = ""
    revision: str = ""
    path: str = ""


class Dataset(Section):
    """Where the rows come from and which of their columns mean what."""

    source: str
    config: str = ""
    revision: str = ""
    split: str = ""
    format: Literal["text", "instruction", "prompt-completion", "chat"]
    columns: dict[str, str]
    eval_fraction: float = Field(ge=0, lt=1)


class Lora(Section):
    """LoRA as in Hu et al. 2021 (arXiv:2106.09685): W + (alpha / r) B A on the target modules."""

    r: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    target_modules: list[str] | Literal["all-linear"]

    @field_validator("target_modules")
    @classmethod
    def in_order(cls, modules: list[str] | str) -> list[str] | str:
        """Their order means nothing, so it must not change a fingerprint."""
        return sorted(set(modules)) if isinstance(modules, list) else modules


class Training(Section):
    """Optimization. Batch sizes count packed rows, lengths count tokens.

    ``attention`` eager keeps packed examples apart; flash, a Neuron kernel, is causal only, so that a row is one text.
    ``activation_checkpointing`` selective recomputes the attention in the backward pass, full whole layers.
    """

    max_sequence_length: int = Field(ge=8)
    packing: bool
    attention: Literal["eager", "flash"] = "eager"
    activation_checkpointing: Literal["none", "selective", "full"] = "selective"
    per_device_batch_size: int = Field(ge=1)
    gradient_accumulation_steps: int = Field(ge=1)
    epochs: float = Field(gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(gt=0)
    lr_scheduler: Literal["linear", "cosine", "constant"]
    warmup_ratio: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    max_grad_norm: float = Field(gt=0)
    save_steps: int = Field(ge=1)
    save_total_limit: int = Field(ge=1)
    seed: int = Field(ge=0)


class Evaluation(Section):
    """How much of the held-out rows the evaluate stage looks at."""

    enabled: bool = True
    max_rows: int = Field(ge=1)
    samples: int = Field(ge=0)
    max_new_tokens: int = Field(ge=1)


class Probe(Section):
    """The proof of the weights: the loss of a few fixed rows at the last save, recomputed after consolidate and merge.

    ``rows`` of them (0: no probe), each cut at ``max_tokens``; ``tolerance`` is in nats per trained token.
    """

    rows: int = Field(default=8, ge=0)
    max_tokens: int = Field(default=512, ge=8)
    tolerance: float = Field(default=0.02, gt=0)


class Compile(Section):
    """How the graphs of backend neuron are compiled, and what train does where the cache was made for other settings.

    ``on`` accelerator compiles where the training will run; cpu only collects the graphs there, and compiles elsewhere.
    Outside its key is ``runsOn``: Helm and other readers of YAML 1.1 take a key ``on`` for the boolean true.
    """

    on: Literal["accelerator", "cpu"] = Field(default="accelerator", alias="runsOn")
    on_mismatch: Literal["refuse", "warn"] = "refuse"


class Parallelism(Section):
    """nodes x processes_per_node workers = tensor_parallel_size x data_parallel_size."""

    nodes: int = Field(ge=1)
    processes_per_node: int = Field(ge=1)
    tensor_parallel_size: int = Field(ge=1)
    data_parallel_size: int = Field(ge=1)


class RunConfig(Section):
    """Everything a stage reads, as the chart's ConfigMap holds it."""

    name: str
    backend: Literal["cpu", "neuron"]
    model: Model
    dataset: Dataset
    lora: Lora
    training: Training
    probe: Probe = Probe()
    compile: Compile = Compile()
    evaluation: Evaluation
    parallelism: Parallelism


def load(path: Path) -> RunConfig:
    """Read and check a run config file.

    Raises UserErrors with one line per mistake, or UserError where the file cannot be read.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix="Pass --config FILE.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"is not YAML: {error}", where=str(path)) from None
    if not isinstance(content, dict):
        raise UserError("holds no mapping of settings", where=str(path), fix="The chart's ConfigMap renders one.")
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise UserErrors(
            [
                UserError(mistake["msg"], where=f"{path} {'.'.join(str(part) for part in mistake['loc'])}")
                for mistake in error.errors()
            ]
        ) from None
