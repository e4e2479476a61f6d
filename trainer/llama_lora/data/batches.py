"""Build the tensors that a model takes from token rows: padded, with a mask that isolates packed examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from llama_lora.data.tokens import IGNORED


class PaddedRows(NamedTuple):
    """Padded rows, int64 [rows, tokens]. ``example`` numbers the examples in a row; padding has a number too."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    example: torch.Tensor


class Batch(NamedTuple):
    """Inputs of a model: int64 [rows, tokens], and attention_mask: bool [rows, 1, tokens, tokens], True = attend."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor


def pad_rows(rows: Sequence[dict[str, Any] | None], length: int, isolated: bool = True) -> PaddedRows:
    """Pad rows of {input_ids, labels, lengths} to ``length`` tokens with token 0. None becomes a row of padding.

    Positions restart with each example if ``isolated``; otherwise the row is one text and they do not.
    """
    input_ids = torch.zeros((len(rows), length), dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORED)
    position_ids = torch.zeros((len(rows), length), dtype=torch.long)
    example = torch.zeros((len(rows), length), dtype=torch.long)
    for index, row in enumerate(rows):
        end = len(row["input_ids"]) if row else 0
        if row:
            input_ids[index, :end] = torch.as_tensor(row["input_ids"])
            labels[index, :end] = torch.as_tensor(row["labels"])
        lengths = [*(row["lengths"] if row and isolated else [end]), length - end]
        position_ids[index] = torch.cat([torch.arange(n) for n in lengths])
        example[index] = torch.repeat_interleave(torch.arange(len(lengths)), torch.as_tensor(lengths))
    return PaddedRows(input_ids, labels, position_ids, example)


def isolating_mask(example: torch.Tensor) -> torch.Tensor:
    """Build a causal mask within each example: bool [rows, 1, tokens, tokens].

    Padding attends to itself: a mask row without any True would give NaN. It has no loss, and nothing attends to it.
    """
    same_example = example[:, :, None] == example[:, None, :]
    return torch.tril(same_example)[:, None]


def make_batch(rows: Sequence[dict[str, Any]], isolated: bool = True) -> Batch:
    """Make one batch, padded to its longest row."""
    padded = pad_rows(rows, max(len(row["input_ids"]) for row in rows), isolated)
    return Batch(padded.input_ids, padded.labels, padded.position_ids, isolating_mask(padded.example))
