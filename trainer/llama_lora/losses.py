"""The loss function of training, evaluation and the dry run."""

from __future__ import annotations

from typing import Any

import torch

from llama_lora.data.batches import Batch
from llama_lora.data.tokens import IGNORED


def loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    """Sum the cross entropy (nats, fp32) over the batch's trained tokens. Divide by their number for the mean.

    Logits are computed only at positions with a label: with a vocabulary of 128,256 they dominate a step's memory.
    """
    next_labels = batch.labels[:, 1:]
    positions = (next_labels != IGNORED).any(dim=0).nonzero().squeeze(1)
    if not len(positions):  # padding rows of the last step: one position keeps a graph for backward()
        positions = torch.zeros(1, dtype=torch.long)
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=positions,
        use_cache=False,
    ).logits
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), next_labels[:, positions].flatten(), ignore_index=IGNORED, reduction="sum"
    )
