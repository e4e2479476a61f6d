"""The CPU backend: transformers + peft, data parallel over gloo. It trains for real; its numbers are not Trainium's."""

from __future__ import annotations

import hashlib
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from genvalues.errors import UserError, UserErrors
from llama_lora.backends import Adapter, TrainingJob, TrainingResult, checkpoints
from llama_lora.config import Lora, RunConfig
from llama_lora.data.batches import batch
from llama_lora.data.rendering import IGNORED
from llama_lora.losses import loss_sum
from llama_lora.plan import Plan
from llama_lora.runlog import RunLog, StepMetrics, check_loss

ADAM_BETAS = (0.9, 0.999)  # transformers' defaults, as are epsilon and plain AdamW
ADAM_EPSILON = 1e-8


class CpuBackend:
    """See ``backends.Backend``."""

    def check(self, config: RunConfig, model: Path) -> None:
        """Target modules, parallelism and sequence length against the model."""
        mistakes = []
        if config.parallelism.tensor_parallel_size != 1:
            mistakes.append(
                UserError(
                    "is for Trainium; the CPU has data parallel only",
                    where="parallelism.tensorParallelSize",
                    fix="Set it to 1.",
                )
            )
        linear, context = describe_model(model)
        wished = config.lora.target_modules
        for name in [] if wished == "all-linear" else wished:
            if name not in linear:
                mistakes.append(
                    UserError(
                        f"the model has no linear layer {name!r}",
                        where="lora.targetModules",
                        fix=f"It has: {', '.join(linear)}.",
                    )
                )
        if config.training.max_sequence_length > context:
            mistakes.append(
                UserError(
                    f"{config.training.max_sequence_length} is more than the {context} positions the model knows",
                    where="training.maxSequenceLength",
                    fix=f"Set it to {context} or less.",
                )
            )
        if mistakes:
            raise UserErrors(mistakes)

    def compile_command(self, command: Sequence[str]) -> list[str]:
        """Nothing is compiled on the CPU: the same workers, for a few steps."""
        return list(command)

    def read_adapter(self, checkpoint: Path) -> Adapter:
        return checkpoints.read_adapter(checkpoint)

    def train(self, job: TrainingJob, finish: Callable[[TrainingResult], None]) -> None:
        """The training loop. The loss is divided by the trained tokens of the whole step, over all workers."""
        from datasets import load_from_disk

        dist.init_process_group("gloo")
        rank, workers = dist.get_rank(), dist.get_world_size()
        rows = load_from_disk(str(job.dataset / "train"))
        plan = Plan(len(rows), workers, job.training)
        model = load_lora_model(job.model, job.lora, job.training.seed)
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        optimizer = torch.optim.AdamW(
            parameters.values(), betas=ADAM_BETAS, eps=ADAM_EPSILON, weight_decay=job.training.weight_decay
        )
        saved = Checkpoints(job, model, parameters, optimizer)
        rows_done = 0 if job.dry_run else saved.restore()
        step = plan.step_after(rows_done)
        last_step = min(job.dry_run or plan.total_steps, plan.total_steps)
        log = None
        if rank == 0 and not job.dry_run:
            log = RunLog(job.paths, job.fingerprint, plan.total_steps, step, rows_done)
        if rank == 0 and step < last_step:
            print(f"training: steps {step + 1} to {last_step} of {plan.total_steps}, {workers} workers", flush=True)

        losses, seconds = [], []
        model.train()
        while step < last_step:
            began = time.monotonic()
            step_rows = [rows[row] for row in plan.step_rows(step) if row is not None]
            trained_tokens = sum(label != IGNORED for row in step_rows for label in row["labels"])
            torch.manual_seed(dropout_seed(job.training.seed, step, rank))
            loss = torch.zeros(())
            for micro_batch in plan.worker_rows(step, rank):
                examples = [rows[row] for row in micro_batch if row is not None]
                if examples:  # the last step may be short of rows
                    micro_loss = loss_sum(model, batch(examples)) / trained_tokens
                    micro_loss.backward()
                    loss += micro_loss.detach()
            sum_over_workers(parameters.values(), loss)
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), job.training.max_grad_norm)
            learning_rate = plan.learning_rate(step)
            metrics = StepMetrics(
                step=step + 1,
                loss=loss.item(),
                learning_rate=learning_rate,
                grad_norm=norm.item(),
                tokens=sum(len(row["input_ids"]) for row in step_rows),
                trained_tokens=trained_tokens,
                rows_done=(step + 1) * plan.global_batch,
            )
            check_loss(metrics)  # before the step: what is saved is never spoilt
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            losses.append(metrics.loss)
            seconds.append(time.monotonic() - began)
            if log:
                log.step(metrics)
            if not job.dry_run and (step % job.training.save_steps == 0 or step == last_step):
                saved.save(step, metrics.rows_done)

        peak_memory = largest_over_workers(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)  # KiB on Linux
        if rank == 0:
            finish(
                TrainingResult(
                    steps=last_step,
                    total_steps=plan.total_steps,
                    seconds_per_step=round(statistics.median(seconds), 3) if seconds else None,
                    peak_memory_bytes=peak_memory,
                    first_loss=losses[0] if losses else None,
                    last_loss=losses[-1] if losses else None,
                    checkpoint=saved.newest(),
                )
            )
        if log:
            log.close()
        dist.barrier()  # with an elastic policy the operator counts the job as done when the first worker ends
        dist.destroy_process_group()


class Checkpoints:
    """The checkpoints of one training job: the adapter and AdamW's state, by the adapter's PEFT names."""

    def __init__(
        self,
        job: TrainingJob,
        model: Any,
        parameters: dict[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.job = job
        self.model = model
        self.parameters = parameters
        self.optimizer = optimizer
        self.folder = job.paths.checkpoints(job.fingerprint)

    def newest(self) -> Path | None:
        """The complete checkpoint of the job that is furthest in the rows."""
        found = checkpoints.complete(self.folder, self.job.fingerprint)
        return found[-1] if found and not self.job.dry_run else None

    def restore(self) -> int:
        """Load the newest checkpoint, if there is one; the number of rows it had consumed."""
        newest = self.newest()
        if newest is None:
            return 0
        if dist.get_rank() == 0:
            print(f"resuming from {newest}", flush=True)
        return checkpoints.load(newest, self._state()).rows_done

    def save(self, step: int, rows_done: int) -> None:
        """Save the state after ``step`` steps and drop the oldest checkpoints beyond saveTotalLimit."""
        record = {
            "fingerprint": self.job.fingerprint,
            "step": step,
            "rows_done": rows_done,
            "workers": dist.get_world_size(),
        }
        checkpoints.save(self.folder, self._state(), adapter_config(self.model, self.job.base_name), record)
        if dist.get_rank() == 0:
            checkpoints.prune(self.folder, self.job.fingerprint, self.job.training.save_total_limit)

    def _state(self) -> dict[str, Any]:
        adapter, moments = {}, {}
        for name, parameter in self.parameters.items():
            peft_name = name.replace(".default.", ".")
            adapter[peft_name] = parameter.data
            state = self.optimizer.state[parameter]
            if not state:  # before the first step: to be filled from a checkpoint
                state.update(
                    step=torch.zeros(()), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter)
                )
            moments[peft_name] = {key: state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
        return {checkpoints.ADAPTER: adapter, "optimizer": moments}


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Dropout depends on these alone, so a resumed step draws what it would have drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:8], "big")


def load_lora_model(path: Path, lora: Lora, seed: int) -> Any:
    """The base model in the dtype it is stored in, with an fp32 adapter initialized from ``seed`` alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="sdpa")
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,  # peft multiplies with it; 0.5 is as good as 16
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )
    return get_peft_model(model, config)


def describe_model(path: Path) -> tuple[list[str], int]:
    """(names of the linear layers LoRA can go on, positions the model knows), without loading a weight."""
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
    """PEFT's adapter_config.json of a model, with what would differ from run to run put in order."""
    config: dict[str, Any] = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=sorted))
    # The hub's name of the base model, not this workspace's: with it AutoPeftModel finds the base model by itself.
    return {**config, "base_model_name_or_path": base_name, "inference_mode": True}


def sum_over_workers(parameters: Iterable[torch.nn.Parameter], loss: torch.Tensor) -> None:
    """Add up the gradients and the loss of all workers, in place, in one collective."""
    parts = [loss.view(1)]
    for parameter in parameters:
        if parameter.grad is None:  # this worker had no row in this step
            parameter.grad = torch.zeros_like(parameter)
        parts.append(parameter.grad.view(-1))
    flat = torch.cat(parts)
    dist.all_reduce(flat)
    for part, summed in zip(parts, flat.split([len(part) for part in parts]), strict=True):
        part.copy_(summed)


def largest_over_workers(number: int) -> int:
    """The largest of the workers' numbers."""
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)
