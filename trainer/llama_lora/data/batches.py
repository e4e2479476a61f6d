"""Rows -> the tensors a model takes: padded, with an attention mask that keeps packed examples apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from llama_lora.data.rendering import IGNORED


class Batch(NamedTuple):
    """input_ids, labels, position_ids: [rows, tokens]; attention_mask: bool [rows, 1, tokens, tokens], True = sees."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor


def batch(rows: Sequence[dict[str, Any]]) -> Batch:
    """Rows of {input_ids, labels, lengths} as one batch, padded (with token 0) to the longest of them.

    A token sees its own example up to itself. Padding is an example of its own: it sees itself (a row of the mask
    without any True would give NaN), carries no loss, and nothing sees it.
    """
    length = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.zeros((len(rows), length), dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORED)
    position_ids = torch.zeros((len(rows), length), dtype=torch.long)
    example = torch.zeros((len(rows), length), dtype=torch.long)
    for index, row in enumerate(rows):
        end = len(row["input_ids"])
        input_ids[index, :end] = torch.as_tensor(row["input_ids"])
        labels[index, :end] = torch.as_tensor(row["labels"])
        lengths = [*row["lengths"], length - end]
        position_ids[index] = torch.cat([torch.arange(n) for n in lengths])
        example[index] = torch.repeat_interleave(torch.arange(len(lengths)), torch.as_tensor(lengths))
    causal = torch.ones((length, length), dtype=torch.bool).tril()
    same_example = example[:, :, None] == example[:, None, :]
    return Batch(input_ids, labels, position_ids, (same_example & causal)[:, None])
