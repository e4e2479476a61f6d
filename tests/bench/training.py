"""LoRA training on the CPU against SFTTrainer: the same model, adapter, rows and optimizer, one process on all cores.

A step is one row, half of whose tokens are trained on. Times are of the median step; reading rows is not part of them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.consolidating import ONE_WORKER
from bench.measure import SMALL, TRL_024, TRL_NEWEST, Bench, Libraries, Measured, alternate, call, compared, processes
from bench.models import SMOLLM2, TINY, make_model
from bench.table import Goal, Line, Result

LENGTH = 64 if SMALL else 256
STEPS = 20  # in fp32, whose losses are compared
FEW = 6
FEWEST = 3  # in bf16: TRL takes a minute a step where the CPU has no instructions for it
RATE = 1e-3
SHAPE = TINY if SMALL else SMOLLM2


def rows_of(steps: int) -> list[dict[str, Any]]:
    import torch

    ids = torch.randint(0, SHAPE["vocab_size"], (steps, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": [-100] * (LENGTH // 2) + row[LENGTH // 2 :]} for row in ids]


def job_of(model: str) -> Any:
    from trainer.native.workers import job

    settings = {"max_sequence_length": LENGTH, "attention": "causal", "weight_decay": 0.0}
    return job(Path(model), Path(model), r=16, alpha=32, dropout=0.0, gradient_accumulation_steps=1, **settings)


def told(seconds: list[float], losses: list[float]) -> dict[str, Any]:
    return {"rate": LENGTH / statistics.median(seconds[1:]), "losses": losses}


def train(model: str, dtype: str, steps: int, output: str) -> dict[str, Any]:
    from llama_lora import environment as environment  # sets the variables that torch reads at import
    from llama_lora.backends.native.devices import open_device
    from llama_lora.backends.native.engine import NativeEngine

    os.environ.update(ONE_WORKER)
    engine = NativeEngine(job_of(model), *open_device("cpu"))
    seconds, losses = [], []
    for step, row in enumerate(rows_of(steps)):
        began = time.perf_counter()
        losses.append(engine.step(step, [[{**row, "lengths": [LENGTH]}]], LENGTH - LENGTH // 2, RATE)().loss)
        seconds.append(time.perf_counter() - began)
    return told(seconds, losses)


def train_with_trl(model: str, dtype: str, steps: int, output: str) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTTrainer

    from llama_lora.backends.lora import initialize_lora, lora_config

    seconds: list[float] = []
    losses: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *given: Any, **options: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *given: Any, **options: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    class Trainer(SFTTrainer):  # type: ignore[misc]
        def compute_loss(self, *given: Any, **options: Any) -> Any:
            found = super().compute_loss(*given, **options)
            losses.append((found[0] if isinstance(found, tuple) else found).item())  # the log rounds to 4 digits
            return found

        def _get_train_sampler(self, *given: Any) -> Any:
            return torch.utils.data.SequentialSampler(dataset)

    job = job_of(model)
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)), lora_config(job.lora)
    )
    initialize_lora(tuned.named_parameters(), job.training.seed)
    settings = sft_settings(
        output,
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=job.training.max_grad_norm,
        max_length=LENGTH,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
    )
    dataset = Dataset.from_list(rows_of(steps))
    Trainer(tuned, train_dataset=dataset, callbacks=[Watch()], **settings).train()
    return told(seconds, losses)


def sft_settings(output: str, **settings: Any) -> dict[str, Any]:
    """SFTTrainer's arguments for one row of tokens a step, of which nothing is written or reported."""
    from trl import SFTConfig

    from trainer.conftest import byte_tokenizer

    tokenizer = byte_tokenizer()  # SFTTrainer needs one, although the rows are tokens
    tokenizer.pad_token = tokenizer.eos_token
    config = SFTConfig(
        output,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        **settings,
    )
    return {"args": config, "processing_class": tokenizer}


def measure(name: str, dtype: str, steps: int, libraries: Libraries) -> Callable[[Path], dict[str, Result]]:
    """Measure line ``name``, and with enough steps the losses, too."""

    def of(work: Path) -> dict[str, Result]:
        model = work / dtype
        call(make_model, model, SHAPE, dtype, {}, libraries=libraries)
        functions = {"ours": train, "trl": train_with_trl}
        rounds = alternate(work, processes(functions, model, dtype, steps, libraries=libraries))
        found = {name: compared(rounds, "rate", "ours", "trl")}
        if steps == STEPS:
            differences = list(map(difference, rounds["ours"], rounds["trl"]))
            found["train-loss"] = Result(differences, versions=found[name].versions)
        return found

    return of


def difference(one: Measured, other: Measured) -> float:
    """The largest of all steps."""
    return max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True))


WORK = f"LoRA training of {'a tiny model' if SMALL else '135 M parameters'} on the CPU"
FASTER = Goal(1.3, least=True)
LOSS = f"largest difference of the loss in {STEPS} steps in fp32"
FP32 = Line("train-fp32", f"{WORK}, fp32", "tokens/s", FASTER, "trl")
BF16 = Line("train-bf16", f"{WORK}, bf16", "tokens/s", FASTER, "trl")
NEWEST_FP32 = Line("train-newest-fp32", f"{WORK}, fp32", "tokens/s", FASTER, "trl")
SAME_LOSS = Line("train-loss", LOSS, "nats", Goal(5e-5), "trl", of_ours=True)
BENCHES = [
    Bench([FP32, SAME_LOSS], measure(FP32.name, "float32", STEPS, TRL_024), TRL_024.lacking),
    Bench([BF16], measure(BF16.name, "bfloat16", FEWEST, TRL_024), TRL_024.lacking),
    Bench([NEWEST_FP32], measure(NEWEST_FP32.name, "float32", FEW, TRL_NEWEST), TRL_NEWEST.lacking),
]
