"""What the graphs of a run depend on: recorded when they are compiled, and compared before a training starts.

A graph that is not in the cache is compiled while a whole cluster of Trainium nodes waits for it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genvalues.common.errors import UserError
from llama_lora.backends.neuron import cache
from llama_lora.graphs import graph_settings, world_size

if TYPE_CHECKING:
    from llama_lora.stage import Stage

# Variables that change graphs or their compilation: AWS Neuron docs, "PyTorch NeuronX Environment Variables" and
# "Neuron Runtime environment variables" (NEURON_LOGICAL_NC_CONFIG: the size of a core), and PyTorch/XLA's own.
ENVIRONMENT = (
    "ALLREDUCE_GRADIENTS_BUCKET_SIZE_MB",
    "BUCKET_CAP_MB",
    "NEURON_CUSTOM_SILU",
    "NEURON_FUSE_SOFTMAX",
    "NEURON_LOGICAL_NC_CONFIG",
    "NEURON_PLATFORM_TARGET_OVERRIDE",
    "NEURON_RT_STOCHASTIC_ROUNDING_EN",
    "OPTIMUM_NEURON_COMMON_FLAGS_MODEL_TYPE",
    "XLA_DISABLE_FUNCTIONALIZATION",
    "XLA_DOWNCAST_BF16",
    "XLA_ENABLE_PARAM_ALIASING",
    "XLA_HLO_DEBUG",
    "XLA_IR_DEBUG",
    "XLA_NO_SPECIAL_SCALARS",
    "XLA_USE_32BIT_LONG",
    "XLA_USE_BF16",
)

# The compiler's version is in every cache key; the others make the graphs.
COMPILER = "neuronx-cc"
PACKAGES = (
    COMPILER,
    "libneuronxla",
    "torch-neuronx",
    "neuronx-distributed",
    "optimum-neuron",
    "torch",
    "torch-xla",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "llama-lora",
)

OTHER_NODES = 30.0  # seconds in which the pods of a job begin
PRODUCT = Path("/sys/devices/virtual/dmi/id/product_name")  # trn1.32xlarge; optimum-neuron looks there too


def provenance(stage: Stage, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """What the graphs that this process would trace depend on, ready for JSON."""
    model = stage.paths.workspace / stage.upstream("tokenize").facts["model"]
    model_config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return {
        "settings": graph_settings(stage.config, model_config, world_size(stage.config)),
        "environment": {
            cache.FLAGS: cache.compiler_flags(environment),
            **{name: environment[name] for name in ENVIRONMENT if name in environment},
        },
        "versions": versions(),
        "platform": platform(),
    }


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def platform() -> str:
    """What the compiler compiles for: trn1 (trn1n too), trn2 (trn2u too); "" on a computer that is neither."""
    try:
        product = PRODUCT.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    family = re.match(r"trn\d+", product)
    return family[0] if family else ""


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each value that differs, as "lora.r: 16 -> 32"."""
    before, after = flat(then), flat(now)
    return [
        f"{name}: {shown(before.get(name))} -> {shown(after.get(name))}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result


def shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)


def check_provenance(stage: Stage) -> None:
    """Before the workers of a training start: was the cache made for them?

    Raises UserError with every value that differs, or with compile.onMismatch: warn tells them and goes on. A refused
    manifest of compile is taken away, so that the next `helm upgrade` compiles, unless the environment alone differs.
    """
    compiled = stage.upstream("compile").facts
    if stage.config.compile.runs_on == "cpu":
        stage.upstream("neff")
    now = json.loads(json.dumps(provenance(stage)))
    differing = differences(compiled.get("provenance", {}), now)
    if not differing:
        return
    found = "the graphs were compiled for something else (then -> now):\n  " + "\n  ".join(differing)
    if stage.config.compile.on_mismatch == "warn":
        print(
            f"WARNING: {found}\nGraphs that are missing are compiled while the training waits, which can take hours "
            "(compile.onMismatch: warn).",
            flush=True,
        )
        return
    if all(line.startswith("environment.") for line in differing):
        fix = "Give compile and train the same environment: set it in stageDefaults.extraEnv."
    else:
        if stage.config.parallelism.nodes > 1:
            time.sleep(OTHER_NODES)  # they are to say the same, not that there is no manifest
        stage.paths.manifest("compile").unlink(missing_ok=True)
        fix = "Compile again: `helm upgrade`, or `llama-lora compile --config ...`, does so now."
    raise UserError(f"{found}\n", where=str(stage.paths.compile_cache), fix=fix)
