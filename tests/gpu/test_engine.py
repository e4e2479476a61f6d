"""The engine on a GPU: the results of the CPU, and the size of a real model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from genvalues.accelerators.architectures import from_config
from gpu.random_model import LLAMA_8B, STEPS, measure, random_job
from llama_lora import acceptance_checks as checks
from llama_lora.acceptance import planned_memory
from llama_lora.backends.base import TrainingJob
from llama_lora.backends.native import engine as engines
from llama_lora.config import DeviceType
from trainer.conftest import make_model
from trainer.native.workers import Trained, in_workers, job, train

GPU: DeviceType = "cuda"


def train_in_fp32(given: TrainingJob) -> Trained:
    engines.weights_dtype = lambda weights, device: torch.float32  # in a fork
    return train(given)


@pytest.mark.parametrize(
    ("dtype", "loss_tolerance", "norm_tolerance"),
    [("float32", 1e-4, 1e-4), ("bfloat16", checks.LOSS_TOLERANCE, checks.NORM_TOLERANCE)],
)
def test_losses_and_gradient_norms_are_those_of_the_cpu(
    dtype: str, loss_tolerance: float, norm_tolerance: float, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", dtype)
    work = train if dtype == "bfloat16" else train_in_fp32
    on_gpu, on_cpu = (in_workers(1, work, job(tmp_path, model, device=device)).steps for device in (GPU, "cpu"))
    assert on_cpu[-2].loss < on_cpu[0].loss - 0.03, "it learns"
    assert [step.loss for step in on_gpu] == pytest.approx([step.loss for step in on_cpu], rel=loss_tolerance)
    norms = [step.grad_norm for step in on_cpu]
    assert [step.grad_norm for step in on_gpu] == pytest.approx(norms, rel=norm_tolerance)


def test_an_8b_model_trains_within_the_planned_memory(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = random_job(tmp_path, LLAMA_8B, GPU)
    measured = in_workers(1, measure, given, LLAMA_8B)
    planned = planned_memory(given, from_config(LLAMA_8B))
    check = checks.planned_memory(GPU, measured.allocated, planned)
    with capfd.disabled():
        print(f"\n8B, 2048 tokens: {measured.tokens_per_second:.0f} tokens/s, loss {measured.losses}, {check}")
    assert len(measured.losses) == STEPS
    assert all(map(math.isfinite, measured.losses))
    assert measured.losses[-1] < measured.losses[0]
    assert check.verdict == "PASS"
