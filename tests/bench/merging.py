"""Merging an adapter into its base model: against peft's merge_and_unload() and save, against a copy, and as it grows.

`llama-lora merge` waits until its files are on the disk; peft does not, and the copy does (`cp -r` and `sync`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from bench.measure import SMALL, Bench, Measured, Sides, alternate, call, command, compared, peak, serve, wall
from bench.models import ALL, LLAMA_1B, Q_V, TINY, make_model
from bench.growing import Size, growth
from bench.table import Goal, Line

ADAPTERS = {"qv": Q_V, "all": ALL}
SHAPE = TINY if SMALL else LLAMA_1B
WORK = f"merge {'a tiny model' if SMALL else '1.24 B parameters in bf16'}"


def with_peft(base: str, adapter: str, output: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output, max_shard_size="1GB")


def ours(base: Path, adapter: Path, output: Path) -> Measured:
    folders = ("--base", base, "--adapter", adapter, "--output", output)
    return command("-m", "llama_lora.cli", "merge", *folders)


def copy(base: Path, output: Path) -> Measured:
    return command("sh", "-c", 'cp -r "$1" "$2" && sync', "sh", base, output)


def measure(work: Path) -> dict[str, Sides]:
    base = work / "base"
    call("bench.models", "make_model", base, SHAPE, "bfloat16", {str(work / name): at for name, at in ADAPTERS.items()})
    found = {}
    for name in ADAPTERS:
        sides = {
            "ours": partial(ours, base, work / name),
            "peft": lambda output, name=name: call("bench.merging", "with_peft", base, work / name, output),
            "copy": partial(copy, base),
        }
        rounds = alternate(work, sides)
        found[f"merge-{name}-time"] = compared(rounds, wall, theirs="peft")
        found[f"merge-{name}-memory"] = compared(rounds, peak, theirs="peft")
        found[f"merge-{name}-copy"] = compared(rounds, wall, theirs="copy")
    return found


def merge_size(work: str, layers: int) -> dict[str, float]:
    """Merge all linear layers of a model of so many layers, without imports and start."""
    import time

    from llama_lora import environment as environment  # sets the variables that torch reads at import
    from llama_lora.stages.merge import merge_adapter

    folder = Path(work)
    began = time.perf_counter()
    merge_adapter(folder / f"base-{layers}", folder / f"adapter-{layers}", folder / "merged")
    return {"seconds": time.perf_counter() - began}


def make_size(work: str, layers: int) -> None:
    hidden = 144 if SMALL else 1152
    shape = TINY | {"vocab_size": 256, "hidden_size": hidden, "intermediate_size": 3 * hidden}
    folder = Path(work)
    of_layers = shape | {"num_hidden_layers": layers}
    make_model(str(folder / f"base-{layers}"), of_layers, "bfloat16", {str(folder / f"adapter-{layers}"): ALL})


MEASURES = {
    "time": ("time", "s", "peft", {"qv": Goal(0.6), "all": Goal(0.5)}),
    "memory": ("peak memory", "MiB", "peft", {"qv": Goal(0.25), "all": Goal(0.25)}),
    "copy": ("time", "s", "cp -r and sync", {"qv": Goal(1.5), "all": Goal(1.5)}),
}
BENCHES = [
    Bench(
        [
            Line(f"merge-{name}-{key}", f"{WORK}, LoRA on {targets}: {what}", unit, goals[name], against)
            for name, targets in {"qv": "q and v", "all": "all linear layers"}.items()
            for key, (what, unit, against, goals) in MEASURES.items()
        ],
        measure,
    ),
    growth("merge", "merge into a model", "layers", Size("bench.merging", "make_size", "merge_size", 4)),
]

if __name__ == "__main__":
    serve(globals())
