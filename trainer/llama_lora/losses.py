"""The loss function of training, evaluation and the dry run."""

from __future__ import annotations

from typing import Any

import torch

from llama_lora.data.batches import Batch
from llama_lora.data.tokens import IGNORED


def loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    """Sum the cross entropy (nats, fp32) over the batch's trained tokens. Divide by their number for the mean."""
    logits, labels = labeled_logits(model, batch)
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def row_loss_sums(model: Any, batch: Batch) -> torch.Tensor:
    """The same for each row: [rows]."""
    logits, labels = labeled_logits(model, batch)
    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(labels.shape).sum(dim=1)


def labeled_logits(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels at the positions where any row has a label: [rows, positions, vocabulary], [rows, positions].

    With a vocabulary of 128,256 all logits would dominate a step's memory.
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
    return logits, next_labels[:, positions]
