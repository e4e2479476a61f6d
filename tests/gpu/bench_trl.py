"""Tokens per second of the native engine and of TRL on one GPU, in the same run: an 8B model with random weights.

Both train LoRA on one row of 2048 tokens per step, with and without recomputation. TRL is not a dependency: install it
beside, with .venv/bin/pip install --no-deps trl. --device cpu tries the script on a small model.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import click
import torch

from bench.training import sft_settings
from gpu.conftest import has_gpu
from gpu.random_model import LEARNING_RATE, LLAMA_8B, STEPS, TINY, measure, random_job, row
from llama_lora.backends.base import TrainingJob
from llama_lora.backends.lora import lora_config
from llama_lora.config import ActivationCheckpointing, DeviceType
from trainer.native.workers import in_workers

RECOMPUTED: tuple[ActivationCheckpointing, ...] = ("none", "full")


def measure_trl(job: TrainingJob, shape: dict[str, Any], folder: Path) -> float:
    """Tokens per second of TRL's median step."""
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
    from trl import SFTTrainer

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        del os.environ[name]  # the Trainer would wrap the model for several processes
    seconds: list[float] = []

    class Timer(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *given: Any, **options: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *given: Any, **options: Any) -> None:
            if job.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)

    with torch.device(job.device):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.model), dtype=torch.bfloat16)
    example = row(job, shape)
    dataset = Dataset.from_list([{key: example[key] for key in ("input_ids", "labels")}] * STEPS)
    settings = sft_settings(
        str(folder / "trl"),
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        max_length=job.training.max_sequence_length,
        gradient_checkpointing=job.training.activation_checkpointing == "full",
        bf16=True,
        use_cpu=job.device == "cpu",
    )
    peft_config = lora_config(job.lora)
    SFTTrainer(model, train_dataset=dataset, peft_config=peft_config, callbacks=[Timer()], **settings).train()
    return job.training.max_sequence_length / statistics.median(seconds[1:])


@click.command(help=(__doc__ or "").split("\n")[0])
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
def main(device: DeviceType) -> None:
    if importlib.util.find_spec("trl") is None:
        click.echo("bench_trl: skipped (needs TRL: .venv/bin/pip install --no-deps trl)")
        return
    if device == "cuda" and not has_gpu():
        click.echo("bench_trl: skipped (needs a GPU)")
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # the Trainer would use all
    shape = TINY if device == "cpu" else LLAMA_8B
    for recompute in RECOMPUTED:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            job = random_job(folder, shape, device, recompute)
            ours = in_workers(1, measure, job, shape).tokens_per_second
            theirs = in_workers(1, measure_trl, job, shape, folder)
        click.echo(f"recompute {recompute}: native {ours:.0f} tokens/s, TRL {theirs:.0f}, {ours / theirs:.2f} times")


if __name__ == "__main__":
    main()
