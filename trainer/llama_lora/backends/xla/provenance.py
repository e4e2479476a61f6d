"""What the graphs of a run depend on: recorded when they are compiled, and compared before a training starts.

A graph that is not in the cache is compiled while all Trainium nodes wait.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_lora.backends.provenance import check_compiled
from llama_lora.backends.xla import cache
from llama_lora.backends.xla.graphs import graph_settings, world_size
from llama_lora.stage import Stage, installed_versions

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

PRODUCT = Path("/sys/devices/virtual/dmi/id/product_name")  # such as trn1.32xlarge; optimum-neuron reads it too


def provenance(stage: Stage, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Collect what the graphs of this process depend on, as JSON values."""
    model = stage.upstream_path("tokenize", "model")
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


def check_provenance(stage: Stage) -> None:
    """Check, before the workers of a training start, that the cached graphs are theirs. See ``check_compiled``."""
    if stage.config.compile.runs_on == "cpu":
        stage.upstream("neff")
    check_compiled(stage, provenance(stage), stage.paths.compile_cache)
