"""The trace of a step on a device that does not exist: its bytes are those of the layout, and it finds mistakes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from genvalues.accelerators import architectures
from genvalues.accelerators.instances import TRAINIUM, TRN2
from llama_lora import config as run_config
from llama_lora.acceptance import planned_memory
from llama_lora.backends.native import engine as engines
from llama_lora.backends.native import fake_device, trace, traced
from llama_lora.backends.native import model as native_model
from llama_lora.backends.native.trace import Trace
from llama_lora.layout_trace import CORE_MEMORY
from trainer.native.workers import in_workers

pytestmark = pytest.mark.long

SMALL = {
    **{"vocab_size": 250, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512},
}


@pytest.fixture(autouse=True)
def _small_chunks() -> None:
    """The chunks of the loss are those of a training, unlike in the other tests of this folder."""


def model_config(kind: str, **sizes: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **{**SMALL, **sizes})


def some_slow(names: Iterable[str], often: Sequence[str]) -> list[Any]:
    """Parameters of a test, which are slow unless they are in ``often``."""
    return [pytest.param(name, marks=() if name in often else pytest.mark.slow) for name in names]


def run(data: int = 1, shard: int = 1, tensor: int = 1, **settings: Any) -> run_config.RunConfig:
    """A run config; keys of lora, training and compile by their names in Python."""

    def block(kind: Any, **defaults: Any) -> Any:
        return kind(**{**defaults, **{key: settings.pop(key) for key in list(settings) if key in kind.model_fields}})

    sizes = {"data_parallel_size": data * shard, "shard_size": shard, "tensor_parallel_size": tensor}
    made = run_config.RunConfig(
        name="traced",
        backend="native",
        device="neuron",
        model=run_config.Model(id="a/b"),
        dataset=run_config.Dataset(source="a/b", format="text"),
        lora=block(run_config.Lora, r=4, dropout=0.0),
        training=block(
            run_config.Training,
            **{"max_sequence_length": 64, "activation_checkpointing": "full", "gradient_accumulation_steps": 1},
        ),
        compile=block(run_config.Compile, mode="off"),
        parallelism=run_config.Parallelism(processes_per_node=data * shard * tensor, **sizes),
    )
    assert not settings
    return made


def traced_in_a_fork(config: run_config.RunConfig, model: Any, **options: Any) -> Trace:
    """The fake device stays registered in a process."""
    result: Trace = in_workers(1, trace.trace, config, model, **options)
    return result


LAYOUTS: dict[str, dict[str, Any]] = {
    "data, shard and tensor": {
        **{"data": 2, "shard": 2, "tensor": 2},
        **{"activation_checkpointing": "selective", "gradient_accumulation_steps": 2},
    },
    "uneven shards": {"shard": 3, "attention": "causal", "target_modules": ["q_proj", "down_proj"]},
    "adapters larger than activations": {"tensor": 4, "r": 64, "max_sequence_length": 8},
}


@pytest.mark.parametrize("name", some_slow(LAYOUTS, often=("adapters larger than activations",)))
def test_three_and_four_layers_tell_of_any_number(name: str) -> None:
    config, model = run(**LAYOUTS[name]), model_config("llama")
    few, all_of_them = traced_in_a_fork(config, model), traced_in_a_fork(config, model, all_layers=True)
    assert few.problems == all_of_them.problems == []
    assert few.operators == all_of_them.operators
    assert few.bytes == all_of_them.bytes
    assert min(few.bytes[term] for term in ("base", "adapter", "gradients", "optimizer", "activations", "loss")) > 0
    assert bool(few.bytes["gathered"]) == ("shard" in LAYOUTS[name])


def test_three_micro_batches_tell_of_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = run(shard=2, gradient_accumulation_steps=5), model_config("llama", num_hidden_layers=1)
    three = traced_in_a_fork(config, model)
    monkeypatch.setattr(traced, "MICRO_BATCHES", 5)
    assert traced_in_a_fork(config, model).bytes == three.bytes
    monkeypatch.setattr(traced, "MICRO_BATCHES", 1)
    assert traced_in_a_fork(config, model).bytes["gradients"] < three.bytes["gradients"]


# --- real sizes

REAL = {"max_sequence_length": 2048, "r": 16, "gradient_accumulation_steps": 1}
RUNS: dict[str, dict[str, Any]] = {  # architectures that genvalues knows, on 4 cores (trn2.3xlarge) or 64
    "llama-3.2-1b": {"data": 4, "activation_checkpointing": "selective", "gradient_accumulation_steps": 3},
    "llama-3.2-3b": {"shard": 4, "activation_checkpointing": "selective", "target_modules": "all-linear"},
    "llama-3.1-8b": {"shard": 4, "activation_checkpointing": "selective", "gradient_accumulation_steps": 3},
    "llama-3.1-70b": {"shard": 16, "tensor": 4, "attention": "causal", "target_modules": "all-linear"},
    "smollm2-135m": {"data": 4, "activation_checkpointing": "none"},
    "tinyllama-1.1b": {"tensor": 4, "activation_checkpointing": "none"},
    "granite-3.0-2b": {"tensor": 4, "per_device_batch_size": 2},
    "granite-3.1-8b": {"shard": 16, "tensor": 4, "activation_checkpointing": "none", "dropout": 0.05},
    "qwen3-0.6b": {"data": 4, "per_device_batch_size": 2},
    "qwen3-4b": {"shard": 4, "dropout": 0.05, "target_modules": "all-linear"},
    "qwen3-8b": {"data": 4, "shard": 4, "tensor": 4, "attention": "causal", "activation_checkpointing": "selective"},
    "qwen3-32b": {"data": 4, "shard": 16, "gradient_accumulation_steps": 3},
}


def real_config(name: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**architectures.table()[name]["config"])


def expected_bytes(config: run_config.RunConfig, model: Any) -> dict[str, int]:
    """What the layout gives the first worker: rows are divided by shards and rounded up."""
    tensor, shard = config.parallelism.tensor_parallel_size, config.parallelism.shard_size
    hidden, inner = model.hidden_size, model.intermediate_size
    head = getattr(model, "head_dim", None) or hidden // model.num_attention_heads
    query, key = model.num_attention_heads * head, model.num_key_value_heads * head
    linear = {"q_proj": (query, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden), "o_proj": (hidden, query)}
    linear |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    split = {
        name: (rows, columns // tensor) if name in ("o_proj", "down_proj") else (rows // tensor, columns)
        for name, (rows, columns) in linear.items()
    }
    targets = list(linear) if config.lora.target_modules == "all-linear" else config.lora.target_modules
    lora = [shape for name in targets for shape in ((config.lora.r, split[name][1]), (split[name][0], config.lora.r))]
    layer = [*split.values(), (hidden, 1), (hidden, 1), *([(head, 1)] * 2 if model.model_type == "qwen3" else [])]
    root = [(model.vocab_size, hidden)] * (1 if model.tie_word_embeddings else 2) + [(hidden, 1)]

    def held(shapes: list[tuple[int, int]]) -> int:
        return sum(-(-rows // shard) * columns for rows, columns in shapes)

    layers = model.num_hidden_layers
    adapter = 4 * layers * held(lora)
    counters = 4 * (layers * len(lora) + 1)  # AdamW's steps, and the learning rate
    return {"base": 2 * (layers * held(layer) + held(root)), "adapter": adapter, "optimizer": 2 * adapter + counters}


def depends_on_data(operator: str) -> bool:
    namespace, name, overload = operator.split(".")
    tags = getattr(getattr(getattr(torch.ops, namespace), name), overload).tags
    return torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags


def differences(planned: dict[str, int], found: dict[str, int]) -> dict[str, float]:
    """By how much the formula differs, as a share of the trace, for the peak and every term above a twentieth of it."""
    return {term: planned[term] / size - 1 for term, size in found.items() if size > found["peak"] / 20}


@pytest.mark.parametrize("name", RUNS)
def test_the_layout_of_a_real_size_is_one_of_trn2(name: str) -> None:
    layout = run(**{**REAL, **RUNS[name]}).parallelism
    groups = [
        each.groups for each in TRAINIUM.values() if each.generation is TRN2 and each.cores == layout.processes_per_node
    ]
    assert groups and all({layout.tensor_parallel_size, layout.shard_size} <= set(each) for each in groups)


@pytest.mark.parametrize("size", some_slow(RUNS, often=("qwen3-8b",)))
def test_a_real_size_runs_on_the_device_in_the_bytes_of_its_layout_and_of_the_plan(size: str) -> None:
    config, model = run(**{**REAL, **RUNS[size]}), real_config(size)
    found = traced_in_a_fork(config, model)
    assert found.problems == []
    assert found.world == config.parallelism.processes_per_node
    assert {term: found.bytes[term] for term in ("base", "adapter", "optimizer")} == expected_bytes(config, model)
    assert not [operator for operator in found.operators if depends_on_data(operator)]
    assert found.bytes["peak"] < CORE_MEMORY
    flash = any("fused_attention" in operator for operator in found.operators)
    assert flash == (config.training.attention == "causal")
    communicates = any(operator.startswith(("c10d.", "_c10d_functional.")) for operator in found.operators)
    assert communicates
    planned = planned_memory(
        trace.training_job(config), architectures.from_config(architectures.table()[size]["config"])
    )
    off = differences({term: getattr(planned, term) for term in trace.TERMS}, found.bytes)
    assert max(map(abs, off.values())) < 0.05, off


# --- mistakes that the trace must find


class ReadsBack(native_model.SummedLoss):
    def forward(self, batch: native_model.ModelBatch) -> torch.Tensor:
        total = super().forward(batch)
        return total / max(1, int((batch.targets != -100).sum()))


class ShapeOfData(native_model.SummedLoss):
    def chunk_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        trained = targets != -100
        return super().chunk_loss(hidden[trained], targets[trained])


class MakesOnTheHost(native_model.SummedLoss):
    def chunk_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return super().chunk_loss(hidden, targets) * torch.ones((), device="cpu")


class HasNoRule(native_model.SummedLoss):
    def chunk_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        library = torch.library.Library("traced_test", "FRAGMENT")
        library.define("unknown(Tensor hidden) -> Tensor")
        return super().chunk_loss(torch.ops.traced_test.unknown(hidden), targets)


MISTAKES = {
    "reads back": (ReadsBack, {}, r"_local_scalar_dense.*depends on data.*test_trace.py"),
    "shape of data": (ShapeOfData, {}, r"nonzero.*depends on data"),
    "made on the host": (MakesOnTheHost, {}, r"mul.*device cpu.*test_trace.py"),
    "no rule": (HasNoRule, {}, r"traced_test.*unknown"),
    "batch on the host": (None, {}, r"another device.*neuron.*cpu"),
    "batch on the host, which FSDP moves": (None, {"shard": 2}, r"_to_copy.*device cpu"),
}


def problems_with_mistake(loss: type[native_model.SummedLoss] | None, config: run_config.RunConfig) -> list[str]:
    if loss is None:
        engines.to_device = lambda batch, device: batch  # in a fork
    else:
        native_model.SummedLoss = loss
    return trace.trace(config, model_config("llama", num_hidden_layers=1)).problems


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str) -> None:
    loss, layout, words = MISTAKES[mistake]
    problems = in_workers(1, problems_with_mistake, loss, run(**layout))
    assert any(re.search(words, problem) for problem in problems), problems


def test_a_layout_that_does_not_fit_the_model_is_a_problem() -> None:
    (problem,) = traced_in_a_fork(run(tensor=3), model_config("llama", num_hidden_layers=1)).problems
    assert "modeling_llama.py" in problem


# --- the monitor, and the command


def live_bytes() -> list[int]:
    with fake_device.opened(1, 0) as mode, traced.DeviceMonitor(mode) as monitor:
        sizes = []
        one = torch.empty(1000, device="neuron")
        view = one.view(10, 100)
        sizes.append(monitor.live.total)
        two = view + 1
        sizes.append(monitor.live.total)
        del one, view
        sizes.append(monitor.live.total)
        two.untyped_storage().resize_(0)
        sizes.append(monitor.live.total)
        return sizes


def test_storages_count_once_and_while_they_live() -> None:
    assert in_workers(1, live_bytes) == [4000, 8000, 4000, 0]


def write_run(folder: Path, **settings: Any) -> list[str]:
    config, model = folder / "run.yaml", folder / "config.json"
    config.write_text(yaml.safe_dump(run(**settings).model_dump(by_alias=True, mode="json")), encoding="utf-8")
    model.write_text(json.dumps({"model_type": "llama", **SMALL, "num_hidden_layers": 1}), encoding="utf-8")
    return ["--config", str(config), "--model", str(model)]


COMMAND = [sys.executable, "-m", trace.__name__]


def plant_torch_neuronx(folder: Path) -> None:
    """A package that PyTorch loads by itself, and which notes that."""
    library, metadata = folder / "torch_neuronx", folder / "torch_neuronx-2.14.dist-info"
    library.mkdir()
    (library / "__init__.py").write_text(f"open({str(folder / 'touched')!r}, 'w').close()", encoding="utf-8")
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-neuronx\nVersion: 2.14\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text("[torch.backends]\nneuron = torch_neuronx:autoload\n", encoding="utf-8")


def test_the_command_prints_one_json_object_and_does_not_touch_torch_neuronx(tmp_path: Path) -> None:
    plant_torch_neuronx(tmp_path)
    options = write_run(tmp_path, shard=2)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([*COMMAND, *options], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "touched").exists()
    found = json.loads(done.stdout.splitlines()[-1])
    kinds = {"world": int, "bytes": dict, "operators": list, "graphs": int, "seconds": float, "problems": list}
    assert {key: type(value) for key, value in found.items()} == kinds
    assert set(found["bytes"]) == set(trace.TERMS)
    assert all(type(size) is int and size > 0 for size in found["bytes"].values())
    assert found["world"] == 2
    assert found["graphs"] == 0
    assert "aten.mm.default" in found["operators"]
    assert found["problems"] == []


def test_a_model_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "hide_torch_neuronx", lambda: None)  # from this process
    missing = str(tmp_path / "none.json")
    done = CliRunner().invoke(trace.main, [*write_run(tmp_path)[:2], "--model", missing])
    assert done.exit_code == 2
    assert missing in done.output
    assert "--model" in done.output
