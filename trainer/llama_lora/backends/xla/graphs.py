"""The settings that XLA graphs of a training depend on, from the run config, the model's config.json and the workers.

Imports no torch, so that `llama-lora fingerprint compile` can use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_lora.config import RunConfig, recorded_attention

# Keys of a model's config.json that no graph depends on. optimum-neuron's Hub cache leaves out these and more.
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
    """Collect every setting that changes a graph.

    ``model_config`` is the base model's config.json. ``world_size`` is the number of all workers: a graph's collectives
    contain the groups of workers.

    Numbers that only scale something are inputs of a graph, but torch-xla writes 0 and 1 as constants (measured with
    torch-xla 2.8.1: x * 2 and x * 3 have the same graph, x * 1 another; the same holds for AdamW's weight decay and
    learning rate; a dropout rate is an input). So only whether such a number is 0 or 1 is recorded: the default
    alpha = r gives a factor of 1. No step has a learning rate of 0 (backends/step_plan.py).
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
            "attention": recorded_attention(config),
            "activationCheckpointing": training.activation_checkpointing,
            "weightDecay": training.weight_decay > 0,
            "maxGradNormIs1": training.max_grad_norm == 1,
        },
        "probe": {"rows": config.probe.rows, "maxTokens": config.probe.max_tokens},
        # The probe has the graph of the held-out loss.
        **({"heldOutLoss": True} if training.eval_steps is not None and not config.probe.rows else {}),
        "parallelism": {
            "workers": world_size,
            "tensorParallelSize": parallelism.tensor_parallel_size,
            "sequenceParallel": parallelism.tensor_parallel_size > 1,
        },
        "optimizer": {"zero1": True},
    }


def world_size(config: RunConfig) -> int:
    return config.parallelism.nodes * config.parallelism.processes_per_node
