"""Rows -> the tensors a model takes: padded, and with an attention mask that keeps packed examples apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from llama_lora.data.rendering import IGNORED


class Arranged(NamedTuple):
    """Rows side by side, int64 [rows, tokens]. ``example`` numbers the examples of a row; padding is one of its own."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    example: torch.Tensor


class Batch(NamedTuple):
    """input_ids, labels, position_ids: [rows, tokens]; attention_mask: bool [rows, 1, tokens, tokens], True = sees."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor


def arrange(rows: Sequence[dict[str, Any] | None], length: int, isolated: bool = True) -> Arranged:
    """Rows of {input_ids, labels, lengths}, padded (with token 0) to ``length`` tokens. None is a row of padding.

    Positions begin anew with each example, or, not ``isolated``, with each row: then a row is one text.
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
    return Arranged(input_ids, labels, position_ids, example)


def sees(example: torch.Tensor) -> torch.Tensor:
    """bool [rows, 1, tokens, tokens]: a token sees its own example up to itself.

    So does padding: a row of the mask without any True would give NaN. It carries no loss, and nothing sees it.
    """
    same_example = example[:, :, None] == example[:, None, :]
    return torch.tril(same_example)[:, None]


def batch(rows: Sequence[dict[str, Any]], isolated: bool = True) -> Batch:
    """Rows as one batch, padded to the longest of them."""
    arranged = arrange(rows, max(len(row["input_ids"]) for row in rows), isolated)
    return Batch(arranged.input_ids, arranged.labels, arranged.position_ids, sees(arranged.example))
