"""What the graphs of a run depend on: recorded when they are compiled, and compared before a training starts.

A graph that is not in the cache is compiled while all Trainium nodes wait.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genvalues.common.dicts import flatten
from genvalues.common.errors import UserError
from llama_lora.backends.neuron import cache
from llama_lora.backends.neuron.graphs import graph_settings, world_size
from llama_lora.stage import Stage, installed_versions

log = logging.getLogger(__name__)

# Variables that change graphs or their compilation. Sources: AWS Neuron docs, "PyTorch NeuronX Environment Variables"
# and "Neuron Runtime environment variables" (NEURON_LOGICAL_NC_CONFIG: the size of a core), and PyTorch/XLA.
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

# The compiler's version is in every cache key; the other packages build the graphs.
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

OTHER_NODES = 30.0  # seconds within which all pods of a job start
PRODUCT = Path("/sys/devices/virtual/dmi/id/product_name")  # such as trn1.32xlarge; optimum-neuron reads it too


def provenance(stage: Stage, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Collect what the graphs of this process depend on, as JSON values."""
    model = stage.paths.workspace / stage.upstream("tokenize").facts["model"]
    model_config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return {
        "settings": graph_settings(stage.config, model_config, world_size(stage.config)),
        "environment": {
            cache.FLAGS: cache.compiler_flags(environment),
            **{name: environment[name] for name in ENVIRONMENT if name in environment},
        },
        "versions": package_versions(),
        "platform": platform(),
    }


def package_versions() -> dict[str, str]:
    return installed_versions(PACKAGES)


def platform() -> str:
    """The compiler's target: trn1 (also trn1n), trn2 (also trn2u); "" on other machines."""
    try:
        product = PRODUCT.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    family = re.match(r"trn\d+", product)
    return family[0] if family else ""


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List each value that differs, as "lora.r: 16 -> 32"."""
    before, after = flatten(then), flatten(now)
    return [
        f"{name}: {show_value(before.get(name))} -> {show_value(after.get(name))}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def show_value(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)


def check_provenance(stage: Stage) -> None:
    """Check, before the workers of a training start, that the cached graphs are theirs.

    Raises UserError with every value that differs; with compile.onMismatch: warn, logs a warning instead. Unless only
    the environment differs, deletes compile's manifest, so that the next `helm upgrade` compiles.
    """
    compiled = stage.upstream("compile").facts
    if stage.config.compile.runs_on == "cpu":
        stage.upstream("neff")
    now = json.loads(json.dumps(provenance(stage)))
    differing = differences(compiled.get("provenance", {}), now)
    if not differing:
        return
    found = "the graphs were compiled for other settings (then -> now):\n  " + "\n  ".join(differing)
    if stage.config.compile.on_mismatch == "warn":
        log.warning(
            f"{found}\nMissing graphs are compiled while the training waits, which can take hours "
            "(compile.onMismatch: warn)."
        )
        return
    if all(line.startswith("environment.") for line in differing):
        fix = "Use the same environment for compile and train: set it in stageDefaults.extraEnv."
    else:
        if stage.config.parallelism.nodes > 1:
            time.sleep(OTHER_NODES)  # the other nodes must read the manifest first, to report the same error
        stage.paths.manifest("compile").unlink(missing_ok=True)
        fix = "Compile again: run `helm upgrade`, or `llama-lora compile --config ...`."
    raise UserError(f"{found}\n", where=str(stage.paths.compile_cache), fix=fix)
