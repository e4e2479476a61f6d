"""Merging shard by shard against peft's merge_and_unload() and save: time and peak memory, as ratios of one run.

Both sides merge the same random bf16 Llama (0.5 B parameters) in a process each, by turns; the medians are printed.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROUNDS = 3

MAKE = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
base, adapter = sys.argv[1:]
config = LlamaConfig(vocab_size=32000, hidden_size=1536, intermediate_size=4096, num_hidden_layers=16,
                     num_attention_heads=12, num_key_value_heads=4)
model = LlamaForCausalLM(config).to(torch.bfloat16)
model.save_pretrained(base, max_shard_size="300MB")
model = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.02)
model.save_pretrained(adapter)
"""
OURS = "import sys; from llama_lora.cli import main; sys.argv[1:1] = ['merge']; main()"
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
_, base, _, adapter, _, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output, max_shard_size="300MB")
"""


class Measured(NamedTuple):
    seconds: float
    peak_bytes: int


def measure(code: str, *arguments: str) -> Measured:
    """Run Python code in a process of its own."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"ended with {os.waitstatus_to_exitcode(status)}")
    return Measured(time.monotonic() - began, usage.ru_maxrss * 1024)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, adapter = str(folder / "base"), str(folder / "adapter")
        measure(MAKE, base, adapter)
        sides: dict[str, list[Measured]] = {"ours": [], "peft": []}
        for turn in range(ROUNDS):
            for side, code in {"ours": OURS, "peft": PEFT}.items():
                output = str(folder / f"{side}-{turn}")
                sides[side].append(measure(code, "--base", base, "--adapter", adapter, "--output", output))
        for unit, index, scale in (("s", 0, 1.0), ("MiB peak", 1, 2.0**20)):
            ours, peft = (statistics.median(run[index] / scale for run in sides[side]) for side in ("ours", "peft"))
            print(f"merge, {unit}: ours {ours:.1f}, peft {peft:.1f}, ratio {ours / peft:.2f}")


if __name__ == "__main__":
    main()
