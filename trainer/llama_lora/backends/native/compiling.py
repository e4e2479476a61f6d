"""The compile stage of native: the train stage's own program for a few steps, and what it adds to the cache.

On the CPU nothing is compiled: the steps check batch, memory and loss, and measure the time per step. On Trainium the
program also saves, measures the probe and resumes, which have graphs too. Its results are real on either.

TorchNeuron keeps compiled graphs (NEFF files) in TORCH_NEURONX_NEFF_CACHE_DIR, which is on the shared volume, and locks
in a folder of the node (AWS Neuron documentation 2.33, TorchNeuron, "Environment variables").
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from genvalues.common.text import duration
from llama_lora.backends.base import TrainingResult
from llama_lora.backends.native.graphs import graph_settings
from llama_lora.paths import Paths
from llama_lora.stage import Stage, installed_versions

log = logging.getLogger(__name__)

CACHE = "TORCH_NEURONX_NEFF_CACHE_DIR"
# Variables that change graphs or their compilation (AWS Neuron documentation, as above, and "Neuron Runtime
# configuration" for the size of a core and the rounding).
ENVIRONMENT = (
    "NEURON_CC_FLAGS",
    "NEURON_LOGICAL_NC_CONFIG",
    "NEURON_RT_STOCHASTIC_ROUNDING_EN",
    "TORCH_NEURONX_COMPLEX_DECOMPOSE",
    "TORCH_NEURONX_ENABLE_NKI_SDPA",
)
PACKAGES = ("neuronx-cc", "nki", "torch-neuronx", "torch", "transformers", "peft", "accelerate", "llama-lora")
UNFINISHED = (".lock", ".tmp")  # of a compilation that runs or was killed


def set_cache(paths: Paths) -> None:
    """Have TorchNeuron use the workspace's cache, unless the environment sets another. Call it before its import."""
    os.environ.setdefault(CACHE, str(paths.neff_cache))


def cached_files(environment: Mapping[str, str] = os.environ) -> dict[Path, int]:
    """The files of the cache and their sizes."""
    folder = Path(environment.get(CACHE, ""))
    if not environment.get(CACHE) or not folder.is_dir():
        return {}
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix not in UNFINISHED)
    return {file: file.stat().st_size for file in files}


def provenance(stage: Stage, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """What the graphs of this process depend on, as JSON values."""
    return {
        "settings": graph_settings(stage.config),
        "environment": {name: environment[name] for name in ENVIRONMENT if name in environment},
        "versions": installed_versions(PACKAGES),
    }


def finish(stage: Stage, result: TrainingResult, before: Iterable[Path]) -> None:
    """Write compile's manifest: what the steps gave and, on Trainium, the files that they added to the cache."""
    assert result.seconds_per_step is not None
    stage.facts = {name: value for name, value in asdict(result).items() if name not in ("checkpoint", "held_out")}
    added: list[Path] = []
    if stage.config.device == "neuron":
        cached = cached_files()
        added = sorted(cached.keys() - set(before))
        stage.facts["provenance"] = provenance(stage)
        stage.facts["cache"] = {
            "files": len(cached),
            "added": len(added),
            "addedBytes": sum(cached[file] for file in added),
        }
        log.info(f"compile: {len(added)} files added to {os.environ[CACHE]}, {len(cached) - len(added)} were in it")
    inside = [file for file in added if file.is_relative_to(stage.paths.workspace)]
    stage.finish(inside)
    log.info(
        f"dry run: {result.steps} steps, loss {result.first_loss:.4f} -> {result.last_loss:.4f}, "
        f"{result.seconds_per_step:.2f} s per step, {result.peak_memory_bytes / 2**30:.1f} GiB per worker; "
        f"{result.total_steps} steps will take about {duration(result.total_steps * result.seconds_per_step)}"
    )
