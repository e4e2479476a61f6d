"""The CPU backend: transformers and peft, data parallel over gloo. Its times and memory do not apply to Trainium."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from genvalues.common import files
from genvalues.common.errors import UserError, UserErrors
from llama_lora import environment
from llama_lora.backends import checkpoints, loop
from llama_lora.backends.base import Adapter, TrainingJob, TrainingResult
from llama_lora.backends.checkpoints import CheckpointRecord
from llama_lora.backends.loop import ADAM_BETAS, ADAM_EPSILON, Row, StepResult
from llama_lora.backends.lora import dropout_seed, initialize_lora, lora_config
from llama_lora.backends.worker_group import WorkerGroup
from llama_lora.config import Lora, RunConfig
from llama_lora.data.batches import make_batch
from llama_lora.losses import loss_sum

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = "adapter"  # the state dict's key for the adapter's tensors, which have PEFT's names


class CpuBackend:
    """See ``base.Backend``."""

    def check(self, config: RunConfig, model: Path) -> None:
        """Check target modules, parallelism and sequence length against the model."""
        mistakes = []
        if config.parallelism.tensor_parallel_size != 1:
            where, fix = "parallelism.tensorParallelSize", "Set it to 1."
            mistakes.append(UserError("backend cpu supports data parallelism only", where=where, fix=fix))
        linear, context = describe_model(model)
        targets = config.lora.target_modules
        for name in [] if targets == "all-linear" else targets:
            if name not in linear:
                where, fix = "lora.targetModules", f"Allowed values: {', '.join(linear)}."
                mistakes.append(UserError(f"the model has no linear layer {name!r}", where=where, fix=fix))
        length = config.training.max_sequence_length
        if length > context:
            where, fix = "training.maxSequenceLength", f"Set it to {context} or less."
            mistakes.append(UserError(f"{length} exceeds the model's {context} positions", where=where, fix=fix))
        if mistakes:
            raise UserErrors(mistakes)

    def train(self, job: TrainingJob, finish: Callable[[TrainingResult], None]) -> None:
        with environment.stdout_discarded():
            dist.init_process_group("gloo")
        loop.run_training(job, CpuEngine(job), WorkerGroup(), finish)
        dist.destroy_process_group()

    def read_adapter(self, checkpoint: Path, base: Path | None) -> Adapter:
        """Read the adapter from the shards, without a model or a process group."""
        checkpoints.verify_checkpoint(checkpoint)
        config = json.loads((checkpoint / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        tensors = {
            name.removeprefix(f"{ADAPTER}."): torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in stored.items()
            if name.startswith(f"{ADAPTER}.") and isinstance(entry, TensorStorageMetadata)
        }
        # Suppresses "assuming the intent is to load in a single process", which is the intent.
        logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
        dcp.load({ADAPTER: tensors}, checkpoint_id=str(checkpoint), no_dist=True)
        for name, tensor in tensors.items():
            if ("lora_A" in name and tensor.shape[0] != config["r"]) or (
                "lora_B" in name and tensor.shape[1] != config["r"]
            ):
                raise UserError(
                    f"{name} has shape {list(tensor.shape)}, but {ADAPTER_CONFIG} says r = {config['r']}",
                    where=str(checkpoint),
                )
        return Adapter(tensors, config)


class CpuEngine:
    """See ``loop.Engine``. Every worker has the whole model and trains on its share of the rows."""

    steps_in_flight = 0
    rehearses = False

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        self.data_rank, self.data_size = dist.get_rank(), dist.get_world_size()
        self.isolated = job.training.attention == "isolated"
        self.model = load_lora_model(job.model, job.lora, job.training.seed).train()
        if job.training.activation_checkpointing == "full":  # sdpa stores no scores, so selective has no effect
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.parameters = {name: param for name, param in self.model.named_parameters() if param.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), betas=ADAM_BETAS, eps=ADAM_EPSILON, weight_decay=job.training.weight_decay
        )

    def step(
        self, step: int, micro_batches: Sequence[Sequence[Row | None]], trained_tokens: int, learning_rate: float
    ) -> Callable[[], StepResult]:
        torch.manual_seed(dropout_seed(self.job.training.seed, step, self.data_rank))
        loss = torch.zeros(())
        for micro_batch in micro_batches:
            examples = [row for row in micro_batch if row is not None]
            if examples:  # the last step may have fewer rows
                micro_loss = loss_sum(self.model, make_batch(examples, self.isolated)) / trained_tokens
                micro_loss.backward()
                loss += micro_loss.detach()
        sum_over_workers(self.parameters.values(), loss)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.job.training.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        result = StepResult(loss.item(), norm.item(), self.optimizer.param_groups[0]["lr"])
        return lambda: result

    def row_loss(self, row: Row) -> float:
        self.model.eval()
        with torch.no_grad():
            loss = loss_sum(self.model, make_batch([row], self.isolated)).item()
        self.model.train()
        return loss

    def save(self, folder: Path) -> None:
        dcp.save(self._state(), checkpoint_id=str(folder))  # fsyncs each shard
        if self.data_rank == 0:
            files.write_json(folder / ADAPTER_CONFIG, adapter_config(self.model, self.job.base_name))

    def restore(self, checkpoint: Path, record: CheckpointRecord) -> None:
        dcp.load(self._state(), checkpoint_id=str(checkpoint))  # in place

    def _state(self) -> dict[str, Any]:
        adapter, moments = {}, {}
        for name, parameter in self.parameters.items():
            peft_name = name.replace(".default.", ".")
            adapter[peft_name] = parameter.data
            state = self.optimizer.state[parameter]
            if not state:  # before the first step: a checkpoint fills it
                state.update(
                    step=torch.zeros(()), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter)
                )
            moments[peft_name] = {key: state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
        return {ADAPTER: adapter, "optimizer": moments}


def load_lora_model(path: Path, lora: Lora, seed: int) -> Any:
    """Load the base model in its stored dtype, with an fp32 adapter initialized from ``seed``."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="sdpa")
    model = get_peft_model(model, lora_config(lora))
    initialize_lora(model.named_parameters(), seed)
    return model


def describe_model(path: Path) -> tuple[list[str], int]:
    """Return the names of the linear layers that LoRA can target, and the context length. Loads no weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    output = model.get_output_embeddings()
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not output
    }
    return sorted(linear), config.max_position_embeddings


def adapter_config(model: Any, base_name: str | None) -> dict[str, Any]:
    """The content of PEFT's adapter_config.json, with sets sorted so that runs give the same file."""
    config: dict[str, Any] = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=sorted))
    # The Hub id, not the path in this workspace: AutoPeftModel loads the base model by it.
    return {**config, "base_model_name_or_path": base_name, "inference_mode": True}


def sum_over_workers(parameters: Iterable[torch.nn.Parameter], loss: torch.Tensor) -> None:
    """Sum the gradients and the loss over all workers, in place, in one collective."""
    parts = [loss.view(1)]
    for parameter in parameters:
        if parameter.grad is None:  # this worker has no row in this step
            parameter.grad = torch.zeros_like(parameter)
        parts.append(parameter.grad.view(-1))
    flat = torch.cat(parts)
    dist.all_reduce(flat)
    for part, summed in zip(parts, flat.split([len(part) for part in parts]), strict=True):
        part.copy_(summed)
