"""The settings that compiled graphs depend on. Imports no torch, for `llama-lora fingerprint compile`."""

from __future__ import annotations

from typing import Any

from llama_lora.config import RunConfig


def graph_settings(config: RunConfig) -> dict[str, Any]:
    """Collect every setting that changes a graph. The model's config.json is covered by tokenize's fingerprint.

    Sizes and the layout are shapes, and a graph's collectives contain the groups of workers. Numbers that only scale
    something (alpha, rates, the norm's limit) are constants in a graph too, except the learning rate and the step.
    """
    training, layout = config.training, config.parallelism
    return {
        "device": config.device,
        "mode": config.compile.mode,
        "lora": config.lora.as_keys(),
        "training": {
            "maxSequenceLength": training.max_sequence_length,
            "perDeviceBatchSize": training.per_device_batch_size,
            "attention": training.attention,
            "activationCheckpointing": training.activation_checkpointing,
            "weightDecay": training.weight_decay,
            "maxGradNorm": training.max_grad_norm,
        },
        "parallelism": {
            "workers": layout.nodes * layout.processes_per_node,
            "tensorParallelSize": layout.tensor_parallel_size,
            "shardSize": layout.shard_size,
        },
    }
