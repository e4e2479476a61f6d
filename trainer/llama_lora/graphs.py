"""What XLA's graphs of a training depend on: a function of the run config, the model's config.json and the workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_lora.config import RunConfig

# Keys of a model's config.json that are in no graph; optimum-neuron's hub cache leaves out the same ones (and more).
NOT_IN_A_GRAPH = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "pad_token_id",
    "transformers_version",
    "use_cache",
}


def graph_settings(config: RunConfig, model_config: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """Everything of a run that changes a graph (FIELD-NOTES 1). Pure.

    ``model_config`` is the base model's config.json, ``world_size`` the number of all workers: groups of workers are
    written into the collectives of a graph.

    Numbers that only scale something are inputs of a graph, except that torch-xla writes 0 and 1 into it as constants
    (measured with torch-xla 2.8.1: x * 2 and x * 3 have one graph, x * 1 another; AdamW's weight decay and learning
    rate are alike; the rate of a dropout is an input). So only whether they are 0 or 1 is here: the default alpha = r
    is such a 1, and a warm-up begins with a learning rate of 0.
    """
    lora, training, parallelism = config.lora, config.training, config.parallelism
    return {
        "model": {name: value for name, value in model_config.items() if name not in NOT_IN_A_GRAPH},
        "dtype": "bfloat16",
        "lora": {
            "r": lora.r,
            "targetModules": lora.target_modules,
            "dropout": lora.dropout > 0,
            "alphaIsR": lora.alpha == lora.r,
        },
        "training": {
            "maxSequenceLength": training.max_sequence_length,
            "perDeviceBatchSize": training.per_device_batch_size,
            "accumulates": training.gradient_accumulation_steps > 1,  # 2 and 3 have the same graphs (measured)
            "packing": training.packing,
            "attention": training.attention,
            "activationCheckpointing": training.activation_checkpointing,
            "weightDecay": training.weight_decay > 0,
            "warmup": training.warmup_ratio > 0,
            "maxGradNormIs1": training.max_grad_norm == 1,
        },
        "probe": {"rows": config.probe.rows, "maxTokens": config.probe.max_tokens},
        "parallelism": {
            "workers": world_size,
            "tensorParallelSize": parallelism.tensor_parallel_size,
            "sequenceParallel": parallelism.tensor_parallel_size > 1,
        },
        "optimizer": {"zero1": True},
    }


def world_size(config: RunConfig) -> int:
    return config.parallelism.nodes * config.parallelism.processes_per_node
