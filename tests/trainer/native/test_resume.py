"""A killed training resumes to the bit in the same layout, and with its optimizer in any other."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from genvalues.common.errors import UserError
from llama_lora.backends import checkpoints
from llama_lora.backends.base import TrainingJob
from llama_lora.backends.checkpoints import CheckpointRecord
from llama_lora.backends.native import shards
from llama_lora.backends.native.backend import NativeBackend
from llama_lora.backends.native.devices import open_device
from llama_lora.backends.native.engine import NativeEngine
from trainer.native.workers import Trained, in_workers, job, take_steps, train, whole_adapter

pytestmark = pytest.mark.long

SHARD = {"data_parallel_size": 2, "shard_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one process": (1, {}),
    "data 2": (2, {"data_parallel_size": 2}),
    "shard 2": (2, SHARD),
    "tensor 2": (2, {"tensor_parallel_size": 2}),
    "shard 2, tensor 2": (4, {**SHARD, "tensor_parallel_size": 2}),
}


def save_and_die(given: TrainingJob, folder: Path) -> None:
    """Save after step 3 and be killed in step 4."""
    device, workers = open_device(given.device)
    engine = NativeEngine(given, device, workers)
    take_steps(engine, 0, 3)
    record = CheckpointRecord("f", 3, 12, workers.size, engine.layout.tensor_size)
    checkpoints.save(folder, record, engine.save, workers)
    take_steps(engine, 3, 4)
    os.kill(os.getpid(), signal.SIGKILL)


def resume(given: TrainingJob, checkpoint: Path) -> Trained:
    engine = NativeEngine(given, *open_device(given.device))
    engine.restore(checkpoint, checkpoints.verify_checkpoint(checkpoint))
    return Trained(take_steps(engine, 3, 6), whole_adapter(engine), engine.optimizer.steps)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def base(request: pytest.FixtureRequest, model: Path, bf16_model: Path) -> Path:
    return {"fp32": model, "bf16": bf16_model}[request.param]


def killed(folder: Path, model: Path, layout: str = "shard 2", **settings: Any) -> Path:
    world, parallelism = LAYOUTS[layout]
    with pytest.raises(AssertionError, match="statuses"):
        in_workers(world, save_and_die, job(folder, model, **settings, **parallelism), folder)
    return folder / "step-000003"


def test_a_killed_training_resumes_to_the_bit(base: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dropout": 0.1}
    checkpoint = killed(tmp_path, base, **settings)
    whole = in_workers(2, train, job(tmp_path, base, **settings, **SHARD))
    resumed = in_workers(2, resume, job(tmp_path, base, **settings, **SHARD), checkpoint)
    assert resumed.steps == whole.steps[3:]
    assert resumed.extra == 6
    for name, tensor in whole.adapter.items():
        assert torch.equal(resumed.adapter[name], tensor), name


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return killed(tmp_path_factory.mktemp("killed"), model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Trained:
    return in_workers(2, train, job(tmp_path_factory.mktemp("whole"), model, **SHARD))


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "shard 2"])
def test_another_layout_resumes_with_its_optimizer(
    name: str, checkpoint: Path, whole: Trained, model: Path, tmp_path: Path
) -> None:
    world, parallelism = LAYOUTS[name]
    resumed = in_workers(world, resume, job(tmp_path, model, **parallelism), checkpoint)
    assert_continues(resumed, whole)


def test_a_checkpoint_of_a_split_model_resumes_in_one_process(whole: Trained, model: Path, tmp_path: Path) -> None:
    checkpoint = killed(tmp_path, model, "shard 2, tensor 2")
    assert_continues(in_workers(1, resume, job(tmp_path, model), checkpoint), whole)


def assert_continues(resumed: Trained, whole: Trained) -> None:
    for got, expected in zip(resumed.steps, whole.steps[3:], strict=True):
        assert abs(got.loss - expected.loss) < 1e-6
        assert abs(got.grad_norm / expected.grad_norm - 1) < 1e-5


def test_the_adapter_is_read_without_workers(checkpoint: Path, model: Path, tmp_path: Path) -> None:
    adapter = NativeBackend().read_adapter(checkpoint, model)
    trained = in_workers(2, train, job(tmp_path, model, **SHARD), steps=3)
    assert adapter.config["r"] == 4
    assert adapter.tensors.keys() == trained.adapter.keys()
    for name, tensor in trained.adapter.items():
        assert torch.equal(adapter.tensors[name], tensor), name


def test_a_checkpoint_has_no_pickle(checkpoint: Path) -> None:
    kinds = {file.suffix for file in checkpoint.iterdir()}
    assert kinds == {".safetensors", ".json"}


def test_a_part_that_is_missing_or_changed_is_named(checkpoint: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(checkpoint, tmp_path / "step-000003"))
    part = sorted(broken.glob("*.safetensors"))[-1]
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=part.name):
        NativeBackend().read_adapter(broken, None)
    part.unlink()
    with pytest.raises(UserError, match=part.name):
        NativeBackend().read_adapter(broken, None)


def test_parts_that_do_not_cover_a_tensor_are_refused(checkpoint: Path) -> None:
    files = sorted(file.name for file in checkpoint.glob("*.safetensors"))
    with pytest.raises(UserError, match="does not have the part"):
        shards.read_adapter(checkpoint, files[:1])


def test_a_checkpoint_of_an_older_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(UserError, match=r"training.json of format 1.*version of llama-lora"):
        shards.read_adapter(tmp_path, ["__0_0.distcp"])
