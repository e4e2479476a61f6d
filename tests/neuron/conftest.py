"""Runs on backend xla, where its libraries are: on a Trainium node, or a CPU in its place (docs/neuron-xla.md)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_lora.backends.xla.provenance import provenance
from llama_lora.stage import Stage
from trainer.conftest import Run, make_model, make_run

IN_WORKERS = Path(__file__).with_name("in_workers.py")


def make_neuron_run(folder: Path, model: Path, tensor: int, data: int, **changes: dict[str, Any]) -> Run:
    """A run on ``tensor`` x ``data`` cores, tokenized; nothing is compiled ahead of it."""
    run = make_run(folder, model, **changes)
    run.config["backend"] = "neuron"
    run.config["training"]["gradientAccumulationSteps"] = 4 // data
    use(run, tensor, data)
    run("tokenize")
    return run


def use(run: Run, tensor: int, data: int) -> None:
    run.config["parallelism"] = {
        "nodes": 1,
        "processesPerNode": tensor * data,
        "tensorParallelSize": tensor,
        "dataParallelSize": data,
    }


def say_compiled(run: Run) -> None:
    """The manifest without which train does not begin, for tests of what is not about graphs."""
    stage = Stage("compile", run.load(), run.paths)
    stage.facts = {"provenance": provenance(stage)}
    stage.finish([])


def trained(run: Run) -> str:
    """Train, and what was said."""
    say_compiled(run)
    return run("train")


def metrics(run: Run) -> list[dict[str, Any]]:
    folder = run.paths.checkpoints(json.loads(run("fingerprint", "train"))["fingerprint"])
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(run: Run) -> list[float]:
    return [step["loss"] for step in metrics(run)]


def in_workers(run: Run, function: str, *arguments: str) -> Any:
    """What a function of in_workers.py returns in the worker of rank 0."""
    count = run.config["parallelism"]["processesPerNode"]
    answer = run.folder / f"{function}.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command = [*torchrun, str(IN_WORKERS), function]
    command += [str(run.write_config()), str(run.workspace), str(answer), *arguments]
    ended = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(answer.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def bf16_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bf16 whose vocabulary and heads can be cut in two and in four."""
    return make_model(
        tmp_path_factory.mktemp("model") / "tiny",
        "bfloat16",
        vocab_size=264,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=8,
        num_key_value_heads=4,
    )


@pytest.fixture(scope="session")
def on_cpu(bf16_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run on the CPU backend, which the Neuron runs are compared with."""
    run = make_run(tmp_path_factory.mktemp("cpu"), bf16_model)
    run.config["training"]["gradientAccumulationSteps"] = 4
    run("tokenize")
    trained(run)
    return run


@pytest.fixture(scope="session")
def trained_run(bf16_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Run]:
    """The same run trained on ``tensor`` x ``data`` cores; once each, so not to be changed."""
    made: dict[tuple[int, int], Run] = {}

    def run_on(tensor: int, data: int) -> Run:
        if (tensor, data) not in made:
            folder = tmp_path_factory.mktemp(f"tp{tensor}-dp{data}")
            made[tensor, data] = make_neuron_run(folder, bf16_model, tensor, data)
            trained(made[tensor, data])
        return made[tensor, data]

    return run_on


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = missing_libraries()
    for item in items:
        if Path(__file__).parent in item.path.parents and "test_graphs.py" not in item.path.name:
            item.add_marker(pytest.mark.neuron)
            if missing:
                item.add_marker(pytest.mark.skip(f"need {missing}: docs/neuron-xla.md"))


def missing_libraries() -> str:
    """The Neuron libraries that are not installed; empty if all are."""
    missing = []
    for name in ("torch_xla", "neuronx_distributed", "optimum.neuron"):
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # the package above it
            found = None
        if found is None:
            missing.append(name)
    return " and ".join(missing)
