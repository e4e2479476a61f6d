"""Functions that tests run in the engine's workers: torchrun in_workers.py FUNCTION CONFIG WORKSPACE ANSWER"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import load_from_disk

from llama_lora import config as run_config
from llama_lora.backends.xla import model as neuron_model
from llama_lora.backends.xla.training import XlaEngine
from llama_lora.paths import Paths
from llama_lora.stage import Stage
from llama_lora.stages.train import training_job


def row_losses(engine: XlaEngine, rows: Any) -> list[list[float]]:
    """For each example of a packed row, its loss before and after a change of all other examples."""
    number = next(index for index in range(len(rows)) if len(rows[index]["lengths"]) > 1)
    row = rows[number]
    found = []
    begin = 0
    for length in row["lengths"]:
        end = begin + length
        labels = [label if begin <= index < end else -100 for index, label in enumerate(row["labels"])]
        others = [token if begin <= index < end else (token + 7) % 250 for index, token in enumerate(row["input_ids"])]
        found.append(
            [
                engine.row_loss({**row, "labels": labels}),
                engine.row_loss({**row, "labels": labels, "input_ids": others}),
            ]
        )
        begin = end
    return found


def buffers_and_long_row(engine: XlaEngine, rows: Any) -> dict[str, Any]:
    """The rotary frequencies on the device, and the loss of the last tokens of a long example."""
    row = {"input_ids": [(7 * i * i + i) % 250 for i in range(1024)], "lengths": [1024]}
    row["labels"] = [-100] * 512 + row["input_ids"][512:]
    frequencies = {
        name.rpartition("model.")[2]: [str(buffer.dtype), buffer.cpu().tolist()]
        for name, buffer in engine.model.named_buffers()
        if name.endswith("inv_freq")
    }
    return {"frequencies": frequencies, "loss": engine.row_loss(row), "row": row}


def gradients(engine: XlaEngine, rows: Any) -> dict[str, list[float]]:
    """The norm and sum of each parameter's gradient for one row, with factors B that are not 0."""
    for name, parameter in engine.parameters.items():
        if ".lora_B." in name:
            parameter.data.fill_(0.01)
    engine._loss_sum([rows[0]]).backward()
    engine.workers.barrier()
    return {
        name: [parameter.main_grad.cpu().norm().item(), parameter.main_grad.cpu().sum().item()]
        for name, parameter in engine.parameters.items()
    }


def summed_gradients(engine: XlaEngine, rows: Any) -> list[Any]:
    """Whether the library is detected to sum gradients, as it is and if it did, and the largest norm in each case."""
    import torch_xla.core.xla_model as xm
    from neuronx_distributed.parallel_layers import parallel_state

    def backward() -> list[Any]:
        engine.optimizer.zero_grad()
        engine._loss_sum([rows[0]]).backward()
        return [parameter.main_grad for parameter in engine.replicated.values()]

    found = []
    for name, parameter in engine.parameters.items():
        if ".lora_B." in name:
            parameter.data.fill_(0.0)
    backward()
    found.append(
        [engine._library_sums(), engine.library_sums]
    )  # gradients of A are 0 as long as B is 0, so nothing can be detected
    for name, parameter in engine.parameters.items():
        if ".lora_B." in name:
            parameter.data.fill_(0.01)
    for fixed in (False, True):
        engine.library_sums = None
        gradients = backward()
        if fixed:
            groups = parallel_state.get_tensor_model_parallel_replica_groups()
            xm.all_reduce(xm.REDUCE_SUM, gradients, groups=groups)
        engine._sum_replicated_gradients()
        found.append([engine.library_sums, max(gradient.cpu().norm().item() for gradient in gradients)])
    return found


def spoilt_save(engine: XlaEngine, rows: Any) -> str:
    """The error of a save after a change of one worker's replica of a factor."""
    from genvalues.common.errors import UserError

    if engine.tensor_rank == 1:
        next(iter(engine.replicated.values())).data.add_(0.5)
    try:
        engine._check_replicas()
    except UserError as error:
        return str(error)
    return ""


def main(function: str, config_file: str, workspace: str, answer: str) -> None:
    config = run_config.load(Path(config_file))
    if config.training.attention == "isolatedFlash":  # neuronx-cc has the kernels, and is for Trainium only
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from trainer.xla.reference_flash import reference_kernels

        neuron_model.nki_kernels = reference_kernels
    job = training_job(Stage("train", config, Paths(Path(workspace), config.name)))
    engine = XlaEngine(job)
    asked: Callable[[XlaEngine, Any], Any] = globals()[function]
    result = asked(engine, load_from_disk(str(job.dataset / "train")))
    if engine.workers.rank == 0:
        Path(answer).write_text(json.dumps(result), encoding="utf-8")
    engine.workers.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
