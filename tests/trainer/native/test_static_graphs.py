"""With compiled layers, no step, save, probe or resume makes a new graph after the first step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from genvalues.common.errors import UserError
from llama_lora.backends import checkpoints, loop
from llama_lora.backends.checkpoints import CheckpointRecord
from llama_lora.backends.native import engine as engines
from llama_lora.backends.native import trace
from llama_lora.backends.native.devices import Device, check_installed, open_device
from llama_lora.backends.native.engine import NativeEngine
from llama_lora.config import Probe
from llama_lora.small_run import write_rows
from trainer.native.test_trace import run, traced_in_a_fork
from trainer.native.workers import in_workers, job, rows_of_step, take_steps

pytestmark = pytest.mark.long

SHARD = {"data_parallel_size": 2, "shard_size": 2}
FEW = {"target_modules": ["q_proj", "down_proj"]}  # traced in half the time


def graphs() -> tuple[int, int]:
    """The graphs compiled so far, and the graph breaks."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def run_of_everything(given: Any, folder: Path) -> tuple[list[tuple[int, int]], float]:
    """Graphs after each part of a training, and the loss of its last step."""
    engines.recomputation = lambda wanted, device: wanted  # in a fork: the CPU leaves selective out
    device, workers = open_device("cpu")
    engine = NativeEngine(given, device, workers, "aot_eager")
    (first,) = take_steps(engine, 0, 1)
    counted = [graphs()]
    take_steps(engine, 1, 4)
    counted.append(graphs())
    record = CheckpointRecord("f", 4, 16, workers.size)
    saved = checkpoints.save(folder, record, engine.save, workers)
    engine.row_loss(rows_of_step(0)[0])
    counted.append(graphs())
    engine.restore(saved, checkpoints.verify_checkpoint(saved))
    short = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "lengths": [3]}
    engine.step(4, [[short], [None]], 4, 1e-2)()  # a short row, and one of padding
    counted.append(graphs())
    return counted, first.loss


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (1, {"activation_checkpointing": "full", "dropout": 0.1, **FEW}),
        pytest.param(1, {"activation_checkpointing": "selective", "dropout": 0.1}, marks=pytest.mark.slow),
        pytest.param(2, {**SHARD, "attention": "causal", **FEW}, marks=pytest.mark.slow),
    ],
)
def test_the_number_of_graphs_stays(world: int, settings: dict[str, Any], model: Path, tmp_path: Path) -> None:
    assert_constant_graphs(world, settings, model, tmp_path)


@pytest.mark.slow
def test_the_number_of_graphs_of_tensor_parallel_stays_and_is_that_of_the_trace(model: Path, tmp_path: Path) -> None:
    settings = {"tensor_parallel_size": 2, "target_modules": ["q_proj", "v_proj"], "activation_checkpointing": "full"}
    graphs = assert_constant_graphs(2, settings, model, tmp_path)
    traced = run(mode="layers", tensor=2, gradient_accumulation_steps=4)  # the same: take_steps has 4 micro-batches
    found = traced_in_a_fork(traced, trace.read_model(traced, model))
    assert found.problems == []
    assert found.graphs == graphs


def assert_constant_graphs(world: int, settings: dict[str, Any], model: Path, folder: Path) -> int:
    """The number of graphs, which no part of a training changes."""
    counted, loss = in_workers(world, run_of_everything, job(folder, model, **settings), folder / "checkpoints")
    assert counted[0][0] > 0
    assert {number for number, _ in counted} == {counted[0][0]}
    assert {breaks for _, breaks in counted} == {0}
    eagerly = in_workers(world, first_loss, job(folder, model, **settings))
    assert loss == pytest.approx(eagerly, abs=1e-5 if "dropout" not in settings else 0.05)
    return counted[0][0]


def first_loss(given: Any) -> float:
    engine = NativeEngine(given, *open_device("cpu"))
    return take_steps(engine, 0, 1)[0].loss


def with_free_shapes(given: Any) -> tuple[int, int]:
    """The control: rows of different lengths make graphs."""
    engine = NativeEngine(given, *open_device("cpu"), "aot_eager")
    engine.static = False
    rows = rows_of_step(0)
    engine.step(0, [[rows[0]]], 10, 1e-2)()
    before, _ = graphs()
    engine.step(1, [[{key: rows[0][key][:30] for key in ("input_ids", "labels")} | {"lengths": [30]}]], 10, 1e-2)()
    return before, graphs()[0]


def test_a_new_shape_would_be_noticed(model: Path, tmp_path: Path) -> None:
    before, after = in_workers(1, with_free_shapes, job(tmp_path, model, **FEW))
    assert after > before


# --- compile and train


Graph = tuple[str, tuple[Any, ...], bool]


def run_of_the_loop(given: Any) -> tuple[list[str], set[Graph]]:
    """What the loop asks of the engine, in order, and every graph with its shapes and whether it has gradients."""
    asked: list[str] = []
    compiled: set[Graph] = set()

    def note(graph: Any, inputs: Any) -> Any:
        shapes = tuple((tuple(each.shape), each.dtype) for each in inputs if isinstance(each, torch.Tensor))
        compiled.add((graph.code, shapes, torch.is_grad_enabled()))
        return graph.forward

    class Noted(NativeEngine):
        def step(self, step: int, *arguments: Any) -> Any:
            asked.append(f"step {step}")
            return super().step(step, *arguments)

        def row_loss(self, *rows: Any) -> float:
            asked.append("probe")
            return super().row_loss(*rows)

        def save(self, folder: Path) -> None:
            asked.append("save")
            super().save(folder)

        def restore(self, *arguments: Any) -> None:
            asked.append("restore")
            super().restore(*arguments)

    engines.recomputation = lambda wanted, device: wanted  # in a fork: the CPU leaves selective out
    device, workers = open_device("cpu")
    loop.run_training(given, Noted(given, device, workers, note), workers, lambda result: None)
    return asked, compiled


def test_compile_has_every_graph_of_train_with_a_save_the_probe_and_a_resume(model: Path, tmp_path: Path) -> None:
    write_rows(rows_of_step(0, count=12), tmp_path)
    settings: dict[str, Any] = {**SHARD, "activation_checkpointing": "selective", "dropout": 0.1}
    settings |= {"gradient_accumulation_steps": 2, "save_steps": 2, **FEW}
    dry = replace(job(tmp_path, model, **settings, max_steps=2), dry_run=3, probe=Probe(rows=2))
    asked, compiled = in_workers(2, run_of_the_loop, dry)
    assert asked == ["step 0", "step 1", "step 2", "probe", "probe", "save", "restore", "step 2"]
    assert not dry.paths.rehearsal.exists() and not dry.paths.checkpoints("f").exists()
    whole = replace(job(tmp_path, model, **settings, max_steps=4), probe=Probe(rows=2))
    asked, trained = in_workers(2, run_of_the_loop, whole)
    assert asked == ["step 0", "step 1", "save", "step 2", "step 3", "probe", "probe", "save"]
    longer = replace(job(tmp_path, model, **settings, max_steps=6), probe=Probe(rows=2))
    asked, resumed = in_workers(2, run_of_the_loop, longer)
    assert asked == ["restore", "step 4", "step 5", "probe", "probe", "save"]
    assert trained == resumed == compiled
    assert {has_gradients for *_, has_gradients in compiled} == {True, False}  # steps, and the probe


def test_compile_has_the_graph_of_the_held_out_loss_without_a_probe_too(model: Path, tmp_path: Path) -> None:
    write_rows(rows_of_step(0, count=8), tmp_path)
    Dataset.from_list(rows_of_step(1, count=3)).save_to_disk(tmp_path / "eval")
    settings: dict[str, Any] = {**FEW, "eval_steps": 2, "gradient_accumulation_steps": 1, "save_steps": 9}
    dry = replace(job(tmp_path, model, **settings, max_steps=2), dry_run=3, probe=Probe(rows=0))
    asked, compiled = in_workers(1, run_of_the_loop, dry)
    assert asked == ["step 0", "step 1", "step 2", "save", "probe", "restore", "step 2"]
    whole = replace(job(tmp_path, model, **settings, max_steps=3), probe=Probe(rows=0))
    asked, trained = in_workers(1, run_of_the_loop, whole)
    rows = ["probe"] * 3
    assert asked == [*rows, "step 0", "step 1", *rows, "step 2", *rows, "save"]
    assert trained == compiled


# --- the device neuron, without one


def test_fallbacks_to_the_cpu_end_the_run_or_warn(caplog: pytest.LogCaptureFixture) -> None:
    engines.report_fallbacks([], "refuse")
    with pytest.raises(UserError, match=r"compile.onFallback.*aten::sort.*warn"):
        engines.report_fallbacks(["aten::sort"], "refuse")
    engines.report_fallbacks(["aten::sort"], "warn")
    assert "aten::sort" in caplog.text


class NeuronLibrary:
    """A stand-in for torch_neuronx's list of operators that it ran on the CPU."""

    def __init__(self) -> None:
        self.operators = ["aten::sort"]

    def get_fallback_ops(self) -> list[str]:
        return self.operators

    def clear_op_tracking(self) -> None:
        self.operators = []


def test_fallbacks_are_those_after_the_last_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_neuronx", NeuronLibrary())
    device = Device("neuron")
    assert device.fallback_operators() == ["aten::sort"]
    device.clear_fallback_operators()
    assert device.fallback_operators() == []
    assert device.static_shapes


def test_a_device_without_its_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"torch_neuronx is not installed.*image"):
        check_installed("neuron")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UserError, match="torch_xla"):
        check_installed("neuron")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        check_installed("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_installed("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match=r"processesPerNode: 8 processes"):
        check_installed("cuda")
    check_installed("cpu")
