"""Every layout of workers trains as one process does: losses, gradient norms and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llama_lora.backends.held_out import HeldOutLoss
from llama_lora.backends.native import engine as engines
from llama_lora.backends.native import layout as layouts
from llama_lora.backends.native import optimizer as optimizers
from llama_lora.backends.native.devices import open_device
from llama_lora.backends.native.model import adapter_parameters
from trainer.native.workers import Trained, in_workers, job, rows_of_step, take_steps, train, whole_adapter

pytestmark = pytest.mark.long

DATA, SHARD, TENSOR = {"data_parallel_size": 2}, {"data_parallel_size": 2, "shard_size": 2}, {"tensor_parallel_size": 2}
LAYOUTS = {
    "data 2": (2, DATA),
    "shard 2": (2, SHARD),
    "tensor 2": (2, TENSOR),
    "data 2, shard 2": (4, {"data_parallel_size": 4, "shard_size": 2}),
    "shard 2, tensor 2": (4, {**SHARD, **TENSOR}),
}


def differences(one: Trained, other: Trained) -> tuple[float, float, float]:
    """The largest differences: loss, gradient norm (relative), adapter."""
    losses = max(abs(a.loss - b.loss) for a, b in zip(one.steps, other.steps, strict=True))
    norms = max(abs(a.grad_norm / b.grad_norm - 1) for a, b in zip(one.steps, other.steps, strict=True))
    adapter = max(float((one.adapter[name] - other.adapter[name]).abs().max()) for name in one.adapter)
    return losses, norms, adapter


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Trained:
    return in_workers(1, train, job(tmp_path_factory.mktemp("run"), model))


@pytest.fixture(scope="module")
def bf16_reference(tmp_path_factory: pytest.TempPathFactory, bf16_model: Path) -> Trained:
    return in_workers(1, train, job(tmp_path_factory.mktemp("run"), bf16_model))


def test_the_reference_learns(reference: Trained) -> None:
    assert len(reference.steps) == 6
    assert reference.steps[-2].loss < reference.steps[0].loss - 0.03  # the same rows
    assert all(bool(tensor.any()) for tensor in reference.adapter.values())


def train_and_measure(given: Any) -> Trained:
    """The held-out loss before, between and after the steps."""
    device, workers = open_device("cpu")
    engine = engines.NativeEngine(given, device, workers)
    held_out = HeldOutLoss(rows_of_step(1, count=5), engine, workers, given.training)
    measured, steps = [held_out.measure(0)], []
    for step in range(0, 6, 3):
        steps += take_steps(engine, step, step + 3)
        measured.append(held_out.measure(step + 3))
    assert workers.gather(measured) == [measured] * workers.size
    return Trained(steps, whole_adapter(engine), measured)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Trained:
    return in_workers(1, train_and_measure, job(tmp_path_factory.mktemp("run"), model))


def test_measuring_the_held_out_loss_changes_no_bit_of_the_training(measured: Trained, reference: Trained) -> None:
    assert measured.steps == reference.steps
    assert measured.extra[0] > measured.extra[-1]
    assert all(torch.equal(measured.adapter[name], tensor) for name, tensor in reference.adapter.items())


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_and_measures_the_held_out_loss_as_one_process(
    name: str, reference: Trained, measured: Trained, model: Path, tmp_path: Path
) -> None:
    world, parallelism = LAYOUTS[name]
    other = in_workers(world, train_and_measure, job(tmp_path, model, per_device_batch_size=2, **parallelism))
    loss, norm, adapter = differences(other, reference)
    assert loss < 1e-5
    assert norm < 1e-4
    assert adapter < 1e-5
    assert other.extra == pytest.approx(measured.extra, abs=1e-5)


@pytest.mark.parametrize("name", ["shard 2", "tensor 2"])
def test_a_bf16_base_trains_as_in_one_process(
    name: str, bf16_reference: Trained, bf16_model: Path, tmp_path: Path
) -> None:
    world, parallelism = LAYOUTS[name]
    loss, norm, _ = differences(in_workers(world, train, job(tmp_path, bf16_model, **parallelism)), bf16_reference)
    assert loss < 1e-3
    assert norm < 2e-2


def with_a_wrong_norm(given: Any) -> Trained:
    """The mistake that losses do not show: a placement of FSDP over tensor parallel is not a Shard."""

    def wrong(parameter: torch.Tensor, world: int) -> float:
        placements = getattr(parameter, "placements", ())
        sizes = [parameter.device_mesh.size(i) for i, each in enumerate(placements) if type(each).__name__ == "Shard"]
        return world / int(torch.tensor(sizes or [1]).prod())

    optimizers.copies = wrong  # in a fork
    return train(given)


def test_a_wrong_gradient_norm_is_noticed(reference: Trained, model: Path, tmp_path: Path) -> None:
    world, parallelism = LAYOUTS["shard 2, tensor 2"]
    trained = in_workers(world, with_a_wrong_norm, job(tmp_path, model, **parallelism))
    assert differences(trained, reference)[1] > 1e-3


def gradients(given: Any, recompute: str, compile_backend: str | None) -> dict[str, torch.Tensor]:
    """Gradients of a step, with recomputation that the CPU would leave out."""
    engines.recomputation = lambda wanted, device: wanted  # in a fork
    engine = engines.NativeEngine(given, *open_device("cpu"), compile_backend)
    torch.manual_seed(0)
    for name, parameter in adapter_parameters(engine.root).items():
        if ".lora_B." in name:  # zero at first, and then A has no gradient
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    for row in rows_of_step(0):
        engine.root(engine._batch([row])).backward()
    wrapped = [name for name, _ in engine.root.named_parameters() if "_checkpoint_wrapped_module" in name]
    assert bool(wrapped) == (recompute != "none")
    return {name: parameter.grad.clone() for name, parameter in adapter_parameters(engine.root).items()}


@pytest.mark.parametrize("compile_backend", [None, pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_recomputation_does_not_change_a_bit(compile_backend: str | None, bf16_model: Path, tmp_path: Path) -> None:
    """With dropout, whose masks must be the same when they are drawn again."""
    found = {}
    for kind in ("none", "selective", "full"):
        modules = ["q_proj", "down_proj"]  # one in each part that is recomputed
        given = job(tmp_path, bf16_model, activation_checkpointing=kind, dropout=0.1, target_modules=modules)
        found[kind] = in_workers(1, gradients, given, kind, compile_backend)
    assert all(bool(gradient.any()) for gradient in found["none"].values())
    for kind in ("selective", "full"):
        for name, gradient in found["none"].items():
            assert torch.equal(found[kind][name], gradient), f"{kind}: {name}"


def with_one_diverged_copy(given: Any, folder: Path) -> str:
    device, workers = open_device("cpu")
    engine = engines.NativeEngine(given, device, workers)
    if workers.rank == 1:
        next(iter(engine.optimizer.local.values())).add_(1e-6)
    try:
        engine.save(folder)
    except Exception as error:
        return f"{type(error).__name__} {error}"
    return "saved"


def test_copies_that_differ_are_not_saved(model: Path, tmp_path: Path) -> None:
    message = in_workers(2, with_one_diverged_copy, job(tmp_path, model, **DATA), tmp_path / "checkpoint")
    assert message.startswith("UserError")
    assert "workers 0 and 1" in message
    assert "lora_A.weight" in message
    assert not (tmp_path / "checkpoint").exists()


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def memory_of_a_worker(given: Any) -> tuple[int, int]:
    """Bytes of base weights that a worker holds, and how much its memory has grown by loading them."""
    device, workers = open_device("cpu")
    before = anonymous_bytes()
    engine = engines.NativeEngine(given, device, workers)
    held = sum(
        optimizers.local_tensor(parameter).nbytes
        for parameter in engine.root.parameters()
        if not parameter.requires_grad
    )
    return held, anonymous_bytes() - before


def test_a_worker_reads_only_its_part_of_the_base_weights(tmp_path: Path) -> None:
    from trainer.conftest import make_model

    large = make_model(tmp_path / "large", hidden_size=1024, intermediate_size=4096, num_key_value_heads=4)
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert size > 100 << 20
    given = job(tmp_path, large, target_modules=["q_proj"], **SHARD)
    held, grown = in_workers(2, memory_of_a_worker, given)
    assert abs(held / (size / 2) - 1) < 0.01
    assert grown < size * 0.75  # half of it is the worker's part; the whole would be read otherwise


def test_a_tensor_group_has_the_same_rows() -> None:
    sizes = in_workers(4, data_ranks, {"data_parallel_size": 2, "tensor_parallel_size": 2, "shard_size": 2})
    assert sizes == [(0, 2), (0, 2), (1, 2), (1, 2)]


def data_ranks(parallelism: dict[str, int]) -> list[tuple[int, int]]:
    from llama_lora.config import Parallelism

    _, workers = open_device("cpu")
    layout = layouts.make_layout("cpu", Parallelism(processes_per_node=4, **parallelism))
    return workers.gather((layout.data_rank, layout.data_size))


def test_dropout_differs_between_rows_and_repeats_on_a_rerun(model: Path, tmp_path: Path) -> None:
    given = job(tmp_path, model, dropout=0.5, **DATA)
    first, second = (in_workers(2, train, given, steps=2) for _ in range(2))
    assert first.steps == second.steps
    without = in_workers(2, train, job(tmp_path, model, **DATA), steps=2)
    assert first.steps[0].grad_norm != without.steps[0].grad_norm
