"""LoRA training on the CPU against SFTTrainer: the same model, adapter, rows and optimizer, one process on all cores.

A step is one row, half of whose tokens are trained on. Times are of the median step; reading rows is not part of them.
"""

from __future__ import annotations

import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

from bench.measure import NEWEST, SMALL, TRL_024, TRL_NEWEST, Bench, Measured, Sides, alternate, call, compared, serve
from bench.models import SMOLLM2, TINY
from bench.preparing import lacks_trl
from bench.table import Goal, Line

LENGTH = 64 if SMALL else 256
STEPS = {"float32": 20, "bfloat16": 8}
RATE = 1e-3
SHAPE = TINY if SMALL else SMOLLM2
WORK = f"LoRA training of {'a tiny model' if SMALL else '135 M parameters'} on the CPU"


def rows(steps: int) -> list[dict[str, Any]]:
    import torch

    ids = torch.randint(0, SHAPE["vocab_size"], (steps, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
    return [
        {"input_ids": row, "labels": [-100] * (LENGTH // 2) + row[LENGTH // 2 :], "lengths": [LENGTH]} for row in ids
    ]


def told(seconds: list[float], losses: list[float]) -> dict[str, Any]:
    return {"rate": LENGTH / statistics.median(seconds[1:]), "losses": losses}


def job_of(model: str) -> Any:
    from trainer.native.workers import job

    settings = {"max_sequence_length": LENGTH, "attention": "causal", "weight_decay": 0.0}
    return job(Path(model), Path(model), r=16, alpha=32, dropout=0.0, gradient_accumulation_steps=1, **settings)


def ours(model: str, dtype: str, output: str) -> dict[str, Any]:
    from llama_lora import environment as environment  # sets the variables that torch reads at import
    from llama_lora.backends.native.devices import open_device
    from llama_lora.backends.native.engine import NativeEngine

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    engine = NativeEngine(job_of(model), *open_device("cpu"))
    seconds, losses = [], []
    for step, row in enumerate(rows(STEPS[dtype])):
        began = time.perf_counter()
        losses.append(engine.step(step, [[row]], LENGTH - LENGTH // 2, RATE)().loss)
        seconds.append(time.perf_counter() - began)
    return told(seconds, losses)


def trl(model: str, dtype: str, output: str) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from llama_lora.backends.lora import initialize_lora, lora_config
    from trainer.conftest import byte_tokenizer

    seconds: list[float] = []
    losses: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *given: Any, **options: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *given: Any, **options: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

        def on_log(self, *given: Any, logs: dict[str, float], **options: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    job = job_of(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    tuned = get_peft_model(base, lora_config(job.lora))
    initialize_lora(tuned.named_parameters(), job.training.seed)
    settings = SFTConfig(
        output,
        max_steps=STEPS[dtype],
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=job.training.max_grad_norm,
        max_length=LENGTH,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    tokenizer = byte_tokenizer()  # SFTTrainer needs one, although the rows are tokens
    tokenizer.pad_token = tokenizer.eos_token
    dataset = Dataset.from_list([{key: row[key] for key in ("input_ids", "labels")} for row in rows(STEPS[dtype])])
    trainer = SFTTrainer(tuned, settings, train_dataset=dataset, processing_class=tokenizer, callbacks=[Watch()])
    trainer._get_train_sampler = lambda *given: torch.utils.data.SequentialSampler(dataset)
    trainer.train()
    return told(seconds, losses)


def measure(work: Path) -> dict[str, Sides]:
    found = {}
    for dtype in STEPS:
        call("bench.models", "make_model", work / dtype, SHAPE, dtype, libraries=NEWEST)
    for name, dtype, libraries in (
        ("fp32", "float32", TRL_024),
        ("bf16", "bfloat16", TRL_024),
        ("newest-fp32", "float32", TRL_NEWEST),
    ):
        sides = {
            side: partial(train, side, work / dtype, dtype, libraries) for side in ("ours", "trl")
        }
        rounds = alternate(work, sides)
        found[f"train-{name}"] = compared(rounds, lambda each: float(each.told["rate"]), theirs="trl")
        if name == "fp32":
            pairs = zip(rounds["ours"], rounds["trl"], strict=True)
            found["train-loss"] = Sides([difference(*pair) for pair in pairs], [], found["train-fp32"].versions)
    return found


def train(side: str, model: Path, dtype: str, libraries: Any, output: Path) -> Measured:
    return call("bench.training", side, model, dtype, output, libraries=libraries)


def difference(one: Measured, other: Measured) -> float:
    """The largest of all steps. SFTTrainer's losses may be rounded to 4 digits in its log."""
    return max(abs(a - b) for a, b in zip(one.told["losses"], other.told["losses"], strict=True))


FASTER = Goal(1.3, least=True)
BENCHES = [
    Bench(
        [
            Line("train-fp32", f"{WORK}, fp32", "tokens/s", FASTER, "trl"),
            Line("train-bf16", f"{WORK}, bf16", "tokens/s", FASTER, "trl"),
            Line("train-newest-fp32", "the same in fp32 with the newest libraries and TRL", "tokens/s", FASTER, "trl"),
            Line(
                "train-loss",
                f"largest difference of the loss in {STEPS['float32']} steps in fp32",
                "nats",
                Goal(5e-5),
                "trl",
                of_ours=True,
            ),
        ],
        measure,
        partial(lacks_trl, TRL_024, TRL_NEWEST),
    )
]

if __name__ == "__main__":
    serve(globals())
