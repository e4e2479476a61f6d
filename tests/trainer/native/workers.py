"""Functions run in the workers of a process group: forks of the test process, which has imported all libraries."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from llama_lora import config
from llama_lora.backends.base import TrainingJob
from llama_lora.backends.loop import Row, StepResult
from llama_lora.backends.native.devices import open_device
from llama_lora.backends.native.engine import NativeEngine
from llama_lora.backends.native.regions import Region, local_region, local_tensor
from llama_lora.paths import Paths

LENGTH = 64


@dataclasses.dataclass
class Trained:
    """What one training gave: the results of its steps, the whole adapter, and what ``work`` returned."""

    steps: list[StepResult]
    adapter: dict[str, torch.Tensor]
    extra: Any = None


def job(folder: Path, model: Path, **settings: Any) -> TrainingJob:
    """A training job; keys of lora, training, parallelism and compile by their names in Python."""

    def block(kind: Any, **defaults: Any) -> Any:
        names = {**defaults, **{key: settings.pop(key) for key in list(settings) if key in kind.model_fields}}
        return kind(**names)

    parallelism = block(config.Parallelism, data_parallel_size=1, processes_per_node=1)
    made = TrainingJob(
        model=model,
        base_name=None,
        dataset=folder,
        lora=block(config.Lora, r=4, alpha=8, dropout=0.0, target_modules="all-linear"),
        training=block(config.Training, max_sequence_length=LENGTH, activation_checkpointing="none", weight_decay=0.01),
        parallelism=parallelism,
        compile=block(config.Compile),
        probe=config.Probe(),
        device=settings.pop("device", "cpu"),
        fingerprint="f",
        paths=Paths(folder, "run"),
    )
    assert not settings, f"unknown settings: {settings}"
    return made


def rows_of_step(step: int, count: int = 4, vocabulary: int = 259) -> list[Row]:
    """Packed rows of three examples with prompts that are not trained on."""
    generator = torch.Generator().manual_seed(step % 2)
    rows = []
    for _ in range(count):
        lengths = [15, 25, 20]
        ids = torch.randint(0, vocabulary - 3, (sum(lengths),), generator=generator).tolist()
        labels, start = list(ids), 0
        for length in lengths:
            labels[start : start + length // 3] = [-100] * (length // 3)
            start += length
        rows.append({"input_ids": ids, "labels": labels, "lengths": lengths})
    return rows


def take_steps(
    engine: NativeEngine, first: int, last: int, rows: Callable[[int], list[Row]] = rows_of_step
) -> list[StepResult]:
    """Steps on the same rows for any layout, a row a micro-batch."""
    results = []
    for step in range(first, last):
        all_rows = rows(step)
        trained = sum(label != -100 for row in all_rows for label in row["labels"][1:])
        own = [[row] for row in all_rows[engine.data_rank :: engine.data_size]]
        results.append(engine.step(step, own, trained, 1e-2)())
    return results


def whole_adapter(engine: NativeEngine) -> dict[str, torch.Tensor]:
    """The adapter, from the parts of all workers."""
    optimizer = engine.optimizer
    parts = {name: (local_region(p), local_tensor(p).cpu()) for name, p in optimizer.parameters.items()}
    gathered: list[dict[str, tuple[Region, torch.Tensor]]] = engine.workers.gather(parts)
    whole = {name: torch.full(p.shape, float("nan")) for name, p in optimizer.parameters.items()}
    for each in gathered:
        for name, (region, values) in each.items():
            region.of(whole[name]).copy_(values)
    return whole


def train(given: TrainingJob, steps: int = 6, compile_backend: str | None = None) -> Trained:
    device, workers = open_device(given.device)
    engine = NativeEngine(given, device, workers, compile_backend)
    return Trained(take_steps(engine, 0, steps), whole_adapter(engine))


def in_workers(world: int, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run ``work`` in ``world`` processes of one process group, and return what the first returns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        statuses = fork_workers(world, port, Path(folder), lambda: work(*arguments, **options))
        errors = "\n".join(file.read_text(encoding="utf-8") for file in sorted(Path(folder).glob("error-*")))
        assert not any(statuses), errors or f"workers ended with statuses {statuses}"
        return pickle.loads((Path(folder) / "answer").read_bytes())


def fork_workers(world: int, port: int, answers: Path, work: Callable[[], Any]) -> list[int]:
    """Fork the workers and wait for them. When one fails the others are killed, which wait for it in a collective."""
    children = []
    sys.stdout.flush()
    for rank in range(world):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
                os.environ.update({key: str(value) for key, value in ranks.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                torch.set_num_threads(1)
                answer = work()
                if rank == 0:
                    (answers / "answer").write_bytes(pickle.dumps(answer))
                if dist.is_initialized():
                    dist.barrier()
                status = 0
            except BaseException:
                (answers / f"error-{rank}").write_text(traceback.format_exc(), encoding="utf-8")
            finally:
                os._exit(status)
        children.append(child)
    statuses: dict[int, int] = {}
    while len(statuses) < world:
        child, status = os.wait()
        if child in children:
            statuses[child] = status
            for other in set(children) - statuses.keys() if status else ():
                os.kill(other, signal.SIGKILL)
    return [statuses[child] for child in children]
