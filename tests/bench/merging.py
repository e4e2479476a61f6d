"""Merging an adapter into its base model: against peft's merge_and_unload() and save, against a copy, and as it grows.

`llama-lora merge` waits until its files are on the disk; peft does not, and the copy does (`cp -r` and `sync`).
"""

from __future__ import annotations

import time
from pathlib import Path

from bench.measure import SMALL, Bench, alternate, call, command, compared, growth
from bench.models import ALL_LINEAR, LLAMA_1B, Q_V, TINY, make_model
from bench.table import Goal, Line, Result

TARGETS = {"qv": Q_V, "all": ALL_LINEAR}


def merge_with_peft(base: str, adapter: str, output: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output, max_shard_size="1GB")


def measure(work: Path) -> dict[str, Result]:
    base, merge = work / "base", ("-m", "llama_lora.cli", "merge")
    adapters = {str(work / name): targets for name, targets in TARGETS.items()}
    call(make_model, base, TINY if SMALL else LLAMA_1B, "bfloat16", adapters)
    found = {}
    for name, adapter in zip(TARGETS, adapters, strict=True):
        of = ("--base", base, "--adapter", adapter, "--output")
        sides = {
            "ours": lambda output, of=of: command(*merge, *of, output),
            "peft": lambda output, adapter=adapter: call(merge_with_peft, base, adapter, output),
            "copy": lambda output: command("sh", "-c", 'cp -r "$1" "$2" && sync', "sh", base, output),
        }
        rounds = alternate(work, sides)
        found[f"merge-{name}-time"] = compared(rounds, "wall", "ours", "peft")
        found[f"merge-{name}-memory"] = compared(rounds, "peak", "ours", "peft")
        found[f"merge-{name}-copy"] = compared(rounds, "wall", "ours", "copy")
    return found


def make_size(work: str, layers: int) -> None:
    hidden = 144 if SMALL else 1152
    shape = {"vocab_size": 256, "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    make_model(f"{work}/base-{layers}", TINY | shape, "bfloat16", {f"{work}/adapter-{layers}": ALL_LINEAR})


def merge_size(work: str, layers: int, output: str) -> dict[str, float]:
    from llama_lora import environment as environment  # sets the variables that torch reads at import
    from llama_lora.stages.merge import merge_adapter

    began = time.perf_counter()
    merge_adapter(Path(work) / f"base-{layers}", Path(work) / f"adapter-{layers}", Path(output))
    return {"seconds": time.perf_counter() - began}


COPY = "cp -r and sync"
WAITS = "it waits until the files are on the disk, and peft does not"
REASON = "it starts Python and imports PyTorch first, and reads every value that changes"
WORK = f"merge {'a tiny model' if SMALL else '1.24 B parameters in bf16'}, LoRA on "
BENCHES = [
    Bench(
        [
            Line("merge-qv-time", f"{WORK}q and v: time", "s", Goal(0.6), "peft", WAITS),
            Line("merge-qv-memory", f"{WORK}q and v: peak memory", "MiB", Goal(0.25), "peft"),
            Line("merge-qv-copy", f"{WORK}q and v: time", "s", Goal(1.5), COPY, REASON),
            Line("merge-all-time", f"{WORK}all linear layers: time", "s", Goal(0.5), "peft"),
            Line("merge-all-memory", f"{WORK}all linear layers: peak memory", "MiB", Goal(0.25), "peft"),
            Line("merge-all-copy", f"{WORK}all linear layers: time", "s", Goal(1.5), COPY, REASON),
        ],
        measure,
    ),
    growth("merge", "merge, LoRA on all linear layers", "layers", make_size, merge_size, 4),
]
