"""Removes GPU libraries that a machine without a GPU never loads: a third of what torch from PyPI brings."""

from __future__ import annotations

from pathlib import Path

import datasets  # noqa: F401
import peft  # noqa: F401
import torch
import torch.distributed.run
import transformers  # noqa: F401

packages = Path(torch.__file__).parents[1]
loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
for folder in ("nvidia", "triton"):
    for file in (packages / folder).rglob("*.so*"):
        if str(file.resolve()) not in loaded:
            file.unlink()
