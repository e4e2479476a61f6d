"""A training step on Neuron cores: optimum-neuron's model, NeuronX Distributed's ZeRO-1 optimizer, and exact resume.

The loop, the rows, the learning rate and the loss's divisor are the project's own (``loop``), because optimum-neuron
0.4.5's trainer has them wrong, silently: the learning rate is cut off the optimizer, pads are trained on, the loss is a
mean of the workers' means, and nothing can be resumed (docs/neuron.md, defects B, C and D). What is wrong with the
gradients of its model (A) is set right in ``_sum_replicated_gradients``, and looked after in ``_check_replicas``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
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
from llama_lora.backends.checkpoints import Record
from llama_lora.backends.loop import ADAM_BETAS, ADAM_EPSILON, Row, StepResult
from llama_lora.backends.lora import dropout_seed
from llama_lora.backends.neuron import model as neuron_model
from llama_lora.backends.neuron import shards
from llama_lora.backends.workers import Workers
from llama_lora.data.batches import Arranged, arrange, sees
from llama_lora.data.rendering import IGNORED

# A worker that meets a graph nobody has compiled compiles it, up to an hour for 8B, and the others wait on the host.
WAIT_FOR_A_GRAPH = timedelta(hours=2)
OPTIMIZER = "optimizer"  # the folder of the optimizer's parts in a checkpoint, a file a worker
# More than 140 MB a bucket gives NaN at the third step (optimum-neuron 0.4.5, accelerator.py, P148368176).
REDUCE_SCATTER_BUCKET_MB = 130


class NeuronEngine:
    """See ``loop.Engine``. A worker has one core; ``tensor_parallel_size`` of them hold one copy of the model."""

    steps_in_flight = 1
    rehearses = True

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        self.extracting = os.environ.get("NEURON_EXTRACT_GRAPHS_ONLY") == "1"  # what a core computes then means nothing
        self.trn_config = neuron_model.neuron_config(job.parallelism, job.training)
        with environment.stdout_discarded():
            self.workers = Workers(dist.new_group(backend="gloo", timeout=WAIT_FOR_A_GRAPH))
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_size = parallel_state.get_data_parallel_size()
        self.tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        self.tensor_size = parallel_state.get_tensor_model_parallel_size()
        self.device = torch_xla.device()
        self._build(adapter=None)

    def _build(self, adapter: Path | None) -> None:
        self.model = neuron_model.load(self.job.model, self.trn_config, self.job.lora, self.job.training, adapter)
        self.parameters = neuron_model.trainable(self.model)
        self.replicated = {name: p for name, p in self.parameters.items() if not neuron_model.is_cut(p)}
        self.library_sums: bool | None = None
        self.vocabulary_is_cut = neuron_model.is_cut(self.model.get_base_model().lm_head.weight)
        # Where it is not (Granite), each worker of a group has the whole loss, and the gradients of all are summed.
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
            use_grad_acc_hook=True,  # gradients add up in fp32,
            higher_cc_precision=True,  # and are summed over the workers in it
            save_master_weights=True,
        )

    def step(
        self, step: int, micro_batches: Sequence[Sequence[Row | None]], trained_tokens: int, learning_rate: float
    ) -> Callable[[], StepResult]:
        xm.set_rng_state(dropout_seed(self.job.training.seed, step, dist.get_rank()))
        # The optimizer takes the mean over the data-parallel workers; the loss is a sum divided by all their tokens.
        # As a tensor: a number of 0 or 1 would be written into the graph.
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
        used = self.optimizer.base_optimizer.param_groups[0]["lr"]  # by the optimizer that steps, not by its wrapper
        self.optimizer.zero_grad()
        torch_xla.sync()
        return lambda: self._taken(step, loss, norm, used, learning_rate, trained_tokens)

    def _taken(
        self, step: int, loss: torch.Tensor, norm: torch.Tensor, used: float, wanted: float, trained_tokens: int
    ) -> StepResult:
        """What a step gave, off the device. Raises RuntimeError where the optimizer did not follow the schedule."""
        if used != wanted:
            raise RuntimeError(f"step {step + 1} was taken at a learning rate of {used}, not {wanted}")
        (summed,) = self.workers.summed([loss.cpu().item() / self.tensor_size])  # a group's workers have the same loss
        if self.extracting:
            return StepResult(0.0, 0.0, used)
        return StepResult(summed / trained_tokens, norm.cpu().item(), used)

    def row_loss(self, row: Row) -> float:
        self.model.eval()
        rows = [row, *[None] * (self.job.training.per_device_batch_size - 1)]
        with torch.no_grad():
            loss = self._loss_sum(rows)
            torch_xla.sync()
        self.model.train()
        return float(loss.cpu().item())

    def _loss_sum(self, rows: Sequence[Row | None]) -> torch.Tensor:
        """Summed cross entropy (nats, fp32) of rows that are all as long as maxSequenceLength: one graph for all."""
        training = self.job.training
        isolated = training.attention == "eager"
        on_device = Arranged(*(part.to(self.device) for part in arrange(rows, training.max_sequence_length, isolated)))
        mask = None
        if isolated:  # added to the scores, as the library takes a mask of four dimensions
            lowest = torch.finfo(torch.bfloat16).min
            mask = torch.where(sees(on_device.example), 0.0, lowest).to(torch.bfloat16)
        logits = self.model(
            input_ids=on_device.input_ids, attention_mask=mask, position_ids=on_device.position_ids, use_cache=False
        ).logits
        # Each position's label is the next token; the last has none. The logits, the largest tensor of all, stay whole.
        labels = torch.nn.functional.pad(on_device.labels[:, 1:], (0, 1), value=IGNORED).flatten()
        logits = logits.float().flatten(0, 1)
        if self.vocabulary_is_cut:
            return parallel_cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    def _sum_replicated_gradients(self) -> None:
        """Sum, over the tensor-parallel group, the gradients of the factors that each of its workers has whole.

        Each sees its part of the sequence (A of a layer cut by columns) or of the output (B of one cut by rows), so
        each has a part of the gradient. optimum-neuron 0.4.5 leaves it at that, and the copies drift apart.
        """
        if self.tensor_size == 1 or self._library_sums():
            return
        gradients = [parameter.main_grad for parameter in self.replicated.values()]
        xm.all_reduce(xm.REDUCE_SUM, gradients, groups=parallel_state.get_tensor_model_parallel_replica_groups())
        torch_xla.sync()  # a graph of its own: what follows is the same without it

    def _library_sums(self) -> bool:
        """Whether the library has summed them itself, as one that is newer may: then they are equal to the last bit.

        Looked at, on the host, until a gradient is not 0, as those of A are while B is.
        """
        if self.extracting:
            return False
        if self.library_sums is None:
            gradients = [parameter.main_grad.cpu() for parameter in self.replicated.values()]
            mine = (self.data_rank, *(sha256_of(gradient) for gradient in gradients))
            groups = set(self.workers.gathered(mine))
            if any(self.workers.gathered(any(bool(gradient.any()) for gradient in gradients))):
                self.library_sums = len(groups) == self.data_size
        return bool(self.library_sums)

    def _check_replicas(self) -> None:
        """Raise UserError where workers have different values for what they hold in common.

        On copies of the host's, so that the device has no graph of it.
        """
        held = {
            (name, self._part(name, parameter)): sha256_of(parameter.detach().cpu())
            for name, parameter in self.parameters.items()
        }
        first: dict[tuple[str, int], tuple[int, str]] = {}
        for rank, digests in enumerate(self.workers.gathered(held)):
            for part, digest in digests.items():
                other, expected = first.setdefault(part, (rank, digest))
                if digest != expected:
                    self._refuse(part[0], other, rank)

    def _part(self, name: str, parameter: torch.nn.Parameter) -> int:
        """Which part of a factor this worker holds: workers with the same one must have the same values."""
        return self.tensor_rank % (self.tensor_size // self._copies(name, parameter))

    def _copies(self, name: str, parameter: torch.nn.Parameter) -> int:
        """How many workers of a tensor-parallel group hold the same part of a factor."""
        if not neuron_model.is_cut(parameter):
            return self.tensor_size
        if name.endswith((".weight_k", ".weight_v")):  # fewer key/value heads than workers: each is held by several
            return int(self.model.get_submodule(name.rpartition(".")[0]).kv_size_multiplier)
        return 1

    def _refuse(self, name: str, one: int, other: int) -> NoReturn:
        values = self.workers.gathered(self.parameters[name].detach().cpu().float())
        difference = (values[one] - values[other]).abs().max().item()
        raise UserError(
            f"{name} differs by up to {difference:.3g} between workers {one} and {other}, which must hold it equal: "
            "what would be saved is not what is trained",
            where=f"optimum-neuron {importlib.metadata.version('optimum-neuron')}",
            fix="Use the versions of trainer/constraints.txt; nothing has been saved of this step.",
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
                    "base_model_name_or_path": self.job.base_name,  # not this workspace's
                },
            )
            shutil.copyfile(self.job.model / "config.json", folder / shards.BASE_CONFIG)
        optimizer = folder / OPTIMIZER / f"rank_{self.workers.rank:05d}.pt"
        optimizer.parent.mkdir(exist_ok=True)
        torch.save(self._state(), optimizer)
        part = f"tp_rank_{self.tensor_rank:02d}_"  # its tensors are written by all data-parallel workers between them
        parts = [file for file in folder.rglob("*") if part in file.relative_to(folder).as_posix()]
        for written in [optimizer, *parts]:
            files.sync(written)  # on the node that wrote it

    def restore(self, checkpoint: Path, record: Record) -> None:
        if (record.workers, record.tensor_parallel_size) != (self.workers.size, self.tensor_size):
            self._warm_start(checkpoint, record)
            return
        state = torch.load(checkpoint / OPTIMIZER / f"rank_{self.workers.rank:05d}.pt", weights_only=True)
        # Put in place, not copied on the device: a resumed training has no graph that the first one had not.
        for (name, parameter), shard in zip(self.parameters.items(), self.optimizer.parts(), strict=True):
            own = state[name]
            parameter.data = own["weight"].to(self.device)
            shard.data = own["master"].to(self.device)
            self.optimizer.base_optimizer.state[shard] = {
                "step": own["step"],
                "exp_avg": own["exp_avg"].to(self.device),
                "exp_avg_sq": own["exp_avg_sq"].to(self.device),
            }
            for holder in (parameter, shard):
                if hasattr(holder, "main_grad"):
                    del holder.main_grad

    def _warm_start(self, checkpoint: Path, record: Record) -> None:
        """Weights alone: the optimizer's parts are cut for other workers."""
        if self.workers.rank == 0:
            print(
                f"warning: {checkpoint.name} was saved by {record.workers} workers with tensorParallelSize "
                f"{record.tensor_parallel_size}, these are {self.workers.size} with {self.tensor_size}. Going on at "
                "the same row with its weights; the optimizer begins anew: it is not the run that was interrupted.",
                flush=True,
            )
        adapter = shards.read_adapter(checkpoint)
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(Path(folder), adapter.tensors, adapter.config)
            del self.model, self.optimizer, self.parameters, self.replicated  # not two of them on a core at once
            self._build(Path(folder))

    def _state(self) -> dict[str, dict[str, torch.Tensor]]:
        """By parameter: its bf16 weight, and what the optimizer has of it, fp32; on the host."""
        state = {}
        for (name, parameter), shard in zip(self.parameters.items(), self.optimizer.parts(), strict=True):
            moments = self.optimizer.base_optimizer.state[shard]
            state[name] = {
                "weight": parameter.detach().cpu(),
                "master": shard.detach().cpu(),
                **{key: moments[key].detach().cpu() for key in ("step", "exp_avg", "exp_avg_sq")},
            }
        return state


class Zero1Optimizer(NeuronZero1Optimizer):
    """NxD's ZeRO-1 optimizer, whose gradient norm counts every factor once.

    NxD's own (get_grad_norm) counts those of key and value once a copy, where there are fewer heads than workers.
    ``copies`` is how many workers of a tensor-parallel group hold the same part of each parameter.
    """

    def __init__(self, copies: Sequence[int], *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.copies = copies

    def parts(self) -> list[torch.nn.Parameter]:
        """This worker's part of each parameter, fp32, as it is stepped."""
        return [part for group in self.base_optimizer.param_groups for part in group["params"]]

    def _get_params_and_grad_norm(self, norm_type: float) -> tuple[list[torch.nn.Parameter], torch.Tensor]:
        """The parts that this worker steps, and the norm of the whole gradient, fp32 [1]."""
        parts = self.parts()
        squares = [part.grad.square().sum() / copies for part, copies in zip(parts, self.copies, strict=True)]
        total = torch.stack(squares).sum().reshape(1)
        for groups in (self._sharding_groups, self._grad_norm_groups):
            xm.all_reduce(xm.REDUCE_SUM, [total], groups=groups, pin_layout=self.pin_layout)
        return parts, total.sqrt()


def sha256_of(tensor: torch.Tensor) -> str:
    """SHA-256 of a host tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
