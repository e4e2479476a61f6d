"""The training step on Neuron cores: optimum-neuron's model, NeuronX Distributed's ZeRO-1 optimizer, exact resume.

The loop is the project's (``loop``), because the trainer of optimum-neuron 0.4.5 has silent defects: the scheduler's
learning rate does not reach the optimizer, padding is trained on, the loss is a mean of the workers' means, and a
training cannot be resumed (docs/neuron-xla.md, defects B, C and D). ``_sum_replicated_gradients`` corrects the
gradients of its model (defect A), and ``_check_replicas`` verifies the result.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_model as xm
from neuronx_distributed.optimizer import NeuronZero1Optimizer
from neuronx_distributed.parallel_layers import parallel_state
from optimum.neuron.models.training.loss_utils import parallel_cross_entropy

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora import environment
from llama_lora.adapter import write_adapter
from llama_lora.backends.base import TrainingJob
from llama_lora.backends.checkpoints import CheckpointRecord
from llama_lora.backends.loop import ADAM_BETAS, ADAM_EPSILON, Row, StepResult
from llama_lora.backends.lora import dropout_seed
from llama_lora.backends.worker_group import WorkerGroup
from llama_lora.backends.xla import model as neuron_model
from llama_lora.backends.xla import shards, torch_files
from llama_lora.backends.xla.flash import MASKED
from llama_lora.data.batches import PaddedRows, isolating_mask, pad_rows
from llama_lora.data.tokens import IGNORED

log = logging.getLogger(__name__)

# A worker compiles a graph that is not in the cache, up to an hour for 8B, while the others wait on the host.
WAIT_FOR_A_GRAPH = timedelta(hours=2)
MOMENTS = ("exp_avg", "exp_avg_sq")
OPTIMIZER = "optimizer"  # the folder of the optimizer's parts in a checkpoint, one file per worker
# More than 140 MB a bucket gives NaN at the third step (optimum-neuron 0.4.5, accelerator.py, P148368176).
REDUCE_SCATTER_BUCKET_MB = 130


class XlaEngine:
    """See ``loop.Engine``. A worker has one core; ``tensor_parallel_size`` workers hold one copy of the model."""

    steps_in_flight = 1
    rehearses = True

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        self.extracting = os.environ.get("NEURON_EXTRACT_GRAPHS_ONLY") == "1"  # devices return zeros then
        self.trn_config = neuron_model.neuron_config(job.parallelism, job.training)
        with environment.stdout_discarded():
            self.workers = WorkerGroup(dist.new_group(backend="gloo", timeout=WAIT_FOR_A_GRAPH))
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_size = parallel_state.get_data_parallel_size()
        self.tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        self.tensor_size = parallel_state.get_tensor_model_parallel_size()
        self.device = torch_xla.device()
        self._build(adapter=None)

    def _build(self, adapter: Path | None) -> None:
        self.model = neuron_model.load_parallel_model(
            self.job.model, self.trn_config, self.job.lora, self.job.training, adapter
        )
        self.parameters = neuron_model.trainable(self.model)
        self.replicated = {name: p for name, p in self.parameters.items() if not neuron_model.is_cut(p)}
        self.library_sums: bool | None = None
        self.vocabulary_is_cut = neuron_model.is_cut(self.model.get_base_model().lm_head.weight)
        # If it is not (Granite), each worker of a group computes the whole loss, and their gradients are summed.
        self.copies_of_loss = 1 if self.vocabulary_is_cut else self.tensor_size
        self.optimizer = Zero1Optimizer(
            [self._copies(name, parameter) for name, parameter in self.parameters.items()],
            self.parameters.values(),
            torch.optim.AdamW,
            optimizer_dtype=torch.float32,
            lr=self.job.training.learning_rate,
            betas=ADAM_BETAS,
            eps=ADAM_EPSILON,
            weight_decay=self.job.training.weight_decay,
            grad_clipping=True,
            max_norm=self.job.training.max_grad_norm,
            pin_layout=False,
            sharding_groups=parallel_state.get_data_parallel_replica_groups(),
            grad_norm_groups=parallel_state.get_tensor_model_parallel_replica_groups(),
            bucket_cap_mb_reduce_scatter=REDUCE_SCATTER_BUCKET_MB,
            bucket_cap_mb_all_gather=max(1, REDUCE_SCATTER_BUCKET_MB // self.data_size),
            use_grad_acc_hook=True,  # accumulates gradients in fp32
            higher_cc_precision=True,  # sums them over the workers in fp32
            save_master_weights=True,
        )

    def step(
        self, step: int, micro_batches: Sequence[Sequence[Row | None]], trained_tokens: int, learning_rate: float
    ) -> Callable[[], StepResult]:
        xm.set_rng_state(dropout_seed(self.job.training.seed, step, dist.get_rank()))
        # The optimizer averages over the data-parallel workers; the loss is a sum divided by the tokens of all of them.
        # A tensor, because a Python number of 0 or 1 would become a constant of the graph.
        share = torch.tensor(self.data_size / trained_tokens / self.copies_of_loss, dtype=torch.float32).to(self.device)
        loss = torch.zeros((), dtype=torch.float32).to(self.device)
        for micro_batch in micro_batches:
            micro_loss = self._loss_sum(micro_batch)
            (micro_loss * share).backward()
            loss = loss + micro_loss.detach()
            torch_xla.sync()
        self._sum_replicated_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        norm = self.optimizer.grad_norm
        used = self.optimizer.base_optimizer.param_groups[0]["lr"]  # of the inner optimizer, which takes the step
        self.optimizer.zero_grad()
        torch_xla.sync()
        return lambda: self._step_result(step, loss, norm, used, learning_rate, trained_tokens)

    def _step_result(
        self, step: int, loss: torch.Tensor, norm: torch.Tensor, used: float, wanted: float, trained_tokens: int
    ) -> StepResult:
        """Wait for a step's result. Raises RuntimeError if the optimizer did not use the scheduled learning rate."""
        if used != wanted:
            raise RuntimeError(f"step {step + 1} used learning rate {used}, not {wanted}")
        (summed,) = self.workers.sum(
            [loss.cpu().item() / self.tensor_size]
        )  # all workers of a group have the same loss
        if self.extracting:
            return StepResult(0.0, 0.0, used)
        return StepResult(summed / trained_tokens, norm.cpu().item(), used)

    def row_loss(self, *rows: Row | None) -> float:
        self.model.eval()
        padding = [None] * (self.job.training.per_device_batch_size - len(rows))
        with torch.no_grad():
            loss = self._loss_sum([*rows, *padding])
            torch_xla.sync()
        self.model.train()
        return float(loss.cpu().item())

    def _loss_sum(self, rows: Sequence[Row | None]) -> torch.Tensor:
        """The summed cross entropy (nats, fp32) of rows padded to maxSequenceLength, so that all use one graph."""
        training = self.job.training
        isolated = training.isolates_examples
        on_device = PaddedRows(
            *(part.to(self.device) for part in pad_rows(rows, training.max_sequence_length, isolated))
        )
        mask = None
        if isolated:  # the library adds a mask with four dimensions to the scores
            lowest = MASKED if training.attention == "isolatedFlash" else torch.finfo(torch.bfloat16).min
            mask = torch.where(isolating_mask(on_device.example), 0.0, lowest).to(torch.bfloat16)
        logits = self.model(
            input_ids=on_device.input_ids, attention_mask=mask, position_ids=on_device.position_ids, use_cache=False
        ).logits
        # Each position's label is the next token; the last has none. Shifting the labels avoids a copy of the logits.
        labels = torch.nn.functional.pad(on_device.labels[:, 1:], (0, 1), value=IGNORED).flatten()
        logits = logits.float().flatten(0, 1)
        if self.vocabulary_is_cut:
            return parallel_cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    def _sum_replicated_gradients(self) -> None:
        """Sum the gradients of replicated factors over the tensor-parallel group.

        Each worker computes the gradient of its part of the sequence (A of a column-parallel layer) or of the output
        (B of a row-parallel layer). optimum-neuron 0.4.5 does not sum these parts, so the replicas diverge.
        """
        if self.tensor_size == 1 or self._library_sums():
            return
        gradients = [parameter.main_grad for parameter in self.replicated.values()]
        xm.all_reduce(xm.REDUCE_SUM, gradients, groups=parallel_state.get_tensor_model_parallel_replica_groups())
        torch_xla.sync()  # ends this graph, so that the next one does not depend on whether there was a sum

    def _library_sums(self) -> bool:
        """Whether the library has summed the gradients, as a newer one may: then they are equal bit for bit.

        Compared on the host at each step until a gradient is not 0. Gradients of A are 0 as long as B is 0.
        """
        if self.extracting:
            return False
        if self.library_sums is None:
            gradients = [parameter.main_grad.cpu() for parameter in self.replicated.values()]
            mine = (self.data_rank, *(sha256_of(gradient) for gradient in gradients))
            groups = set(self.workers.gather(mine))
            if any(self.workers.gather(any(bool(gradient.any()) for gradient in gradients))):
                self.library_sums = len(groups) == self.data_size
        return bool(self.library_sums)

    def _check_replicas(self) -> None:
        """Raise UserError if workers have different values for the same parameter.

        Compares copies on the host, so that the device needs no graph for it.
        """
        held = {
            (name, self._part(name, parameter)): sha256_of(parameter.detach().cpu())
            for name, parameter in self.parameters.items()
        }
        first: dict[tuple[str, int], tuple[int, str]] = {}
        for rank, digests in enumerate(self.workers.gather(held)):
            for part, digest in digests.items():
                other, expected = first.setdefault(part, (rank, digest))
                if digest != expected:
                    self._refuse(part[0], other, rank)

    def _part(self, name: str, parameter: torch.nn.Parameter) -> int:
        """The number of this worker's part of a factor. Workers with the same part must have the same values."""
        return self.tensor_rank % (self.tensor_size // self._copies(name, parameter))

    def _copies(self, name: str, parameter: torch.nn.Parameter) -> int:
        """The number of workers of a tensor-parallel group that hold the same part of a factor."""
        if not neuron_model.is_cut(parameter):
            return self.tensor_size
        if name.endswith((".weight_k", ".weight_v")):  # with fewer kv heads than workers, each head is replicated
            return int(self.model.get_submodule(name.rpartition(".")[0]).kv_size_multiplier)
        return 1

    def _refuse(self, name: str, one: int, other: int) -> NoReturn:
        values = self.workers.gather(self.parameters[name].detach().cpu().float())
        difference = (values[one] - values[other]).abs().max().item()
        raise UserError(
            f"{name} differs by up to {difference:.3g} between workers {one} and {other}, where it must be equal: "
            "a checkpoint would not contain the trained weights",
            where=f"optimum-neuron {importlib.metadata.version('optimum-neuron')}",
            fix="Use the versions in trainer/constraints-xla.txt. This step was not saved.",
        )

    def save(self, folder: Path) -> None:
        if not self.extracting:
            self._check_replicas()
        first = self.workers.rank == 0
        self.model.save_pretrained(str(folder), is_main_process=first)
        if first:
            (folder / "README.md").unlink(missing_ok=True)
            config = folder / shards.ADAPTER / "adapter_config.json"
            files.write_json(
                config,
                {
                    **json.loads(config.read_text(encoding="utf-8")),
                    "base_model_name_or_path": self.job.base_name,  # not the path in this workspace
                },
            )
            shutil.copyfile(self.job.model / "config.json", folder / shards.BASE_CONFIG)
        optimizer = folder / OPTIMIZER / f"rank_{self.workers.rank:05d}.pt"
        optimizer.parent.mkdir(exist_ok=True)
        torch.save(self._state(), optimizer)
        part = f"tp_rank_{self.tensor_rank:02d}_"  # the data-parallel workers divide its tensors among them
        parts = [file for file in folder.rglob("*") if part in file.relative_to(folder).as_posix()]
        for written in [optimizer, *parts]:
            files.sync(written)  # a file must be synced on the node that wrote it

    def restore(self, checkpoint: Path, record: CheckpointRecord) -> None:
        if (record.workers, record.tensor_parallel_size) != (self.workers.size, self.tensor_size):
            self._warm_start(checkpoint, record)
            return
        file = checkpoint / OPTIMIZER / f"rank_{self.workers.rank:05d}.pt"
        state = torch_files.load(file)
        # Replaced, not copied on the device: a copy would be a graph that only a resumed training has.
        for (name, parameter), shard in zip(self.parameters.items(), self.optimizer.parts(), strict=True):
            like = {"weight": parameter, "master": shard, **dict.fromkeys(MOMENTS, shard)}
            own = self._checked(state, name, like, file)
            parameter.data = own["weight"].to(self.device)
            shard.data = own["master"].to(self.device)
            self.optimizer.base_optimizer.state[shard] = {
                "step": own["step"],
                **{moment: own[moment].to(self.device) for moment in MOMENTS},
            }
            for holder in (parameter, shard):
                if hasattr(holder, "main_grad"):
                    del holder.main_grad

    def _checked(self, state: Any, name: str, like: dict[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
        """A parameter's tensors in a checkpoint, which have the shapes of ``like``. Raises UserError if they do not."""
        own: dict[str, torch.Tensor] | None = state.get(name) if isinstance(state, dict) else None
        shapes = {key: getattr(value, "shape", None) for key, value in own.items()} if isinstance(own, dict) else {}
        if own is None or "step" not in shapes or any(shapes.get(key) != each.shape for key, each in like.items()):
            raise UserError(f"has no state of {name} in its shape", where=str(file), fix=torch_files.TRAIN_AGAIN)
        return own

    def _warm_start(self, checkpoint: Path, record: CheckpointRecord) -> None:
        """Load only the weights: the optimizer's parts are for another number of workers."""
        if self.workers.rank == 0:
            log.warning(
                f"{checkpoint.name} was saved by {record.workers} workers with tensorParallelSize "
                f"{record.tensor_parallel_size}; now there are {self.workers.size} with {self.tensor_size}. Resuming "
                "at the same row with its weights and a new optimizer state: the result differs from an uninterrupted "
                "run."
            )
        adapter = shards.read_adapter(checkpoint)
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(Path(folder), adapter.tensors, adapter.config)
            del self.model, self.optimizer, self.parameters, self.replicated  # a core has no memory for two
            self._build(Path(folder))

    def _state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Host copies by parameter: the bf16 weight, and the optimizer's fp32 weight and moments."""
        state = {}
        for (name, parameter), shard in zip(self.parameters.items(), self.optimizer.parts(), strict=True):
            moments = self.optimizer.base_optimizer.state[shard]
            state[name] = {
                "weight": parameter.detach().cpu(),
                "master": shard.detach().cpu(),
                **{key: moments[key].detach().cpu() for key in ("step", *MOMENTS)},
            }
        return state


class Zero1Optimizer(NeuronZero1Optimizer):
    """NxD's ZeRO-1 optimizer with a gradient norm that counts every factor once.

    NxD's get_grad_norm counts replicated factors of k_proj and v_proj (fewer kv heads than workers) once per replica.
    ``copies`` is, for each parameter, the number of workers of a tensor-parallel group that hold the same part.
    """

    def __init__(self, copies: Sequence[int], *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.copies = copies

    def parts(self) -> list[torch.nn.Parameter]:
        """This worker's fp32 part of each parameter, which the inner optimizer updates."""
        return [part for group in self.base_optimizer.param_groups for part in group["params"]]

    def _get_params_and_grad_norm(self, norm_type: float) -> tuple[list[torch.nn.Parameter], torch.Tensor]:
        """Return this worker's parts and the norm of the whole gradient, fp32 [1]."""
        parts = self.parts()
        squares = [part.grad.square().sum() / copies for part, copies in zip(parts, self.copies, strict=True)]
        total = torch.stack(squares).sum().reshape(1)
        for groups in (self._sharding_groups, self._grad_norm_groups):
            xm.all_reduce(xm.REDUCE_SUM, [total], groups=groups, pin_layout=self.pin_layout)
        return parts, total.sqrt()


def sha256_of(tensor: torch.Tensor) -> str:
    """The hex SHA-256 of a host tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
