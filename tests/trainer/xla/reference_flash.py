"""NKI's flash kernels as documented (aws-neuron/nki-samples, reference/attention.py), computed by PyTorch.

They are called as the kernels are: ``kernel[rows, heads](...)``. Both add one bias to the scaled scores of all heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from llama_lora.backends.xla.flash import Kernels

PARTITIONS = 128  # nl.tile_size.pmax, in the layout of the log-sum-exp


class Launched:
    """``kernel[grid](...)``, which also notes the grids."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        self.grids.append(grid)
        return self.kernel


def scores(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    """q and k [rows, heads, features, tokens]. nki-samples, reference/attention.py: scaled, biased, then causal."""
    tokens = q.shape[-1]
    assert bias.shape == (1, 1, tokens, tokens), "the kernels support only one bias"
    found = q.transpose(2, 3).float() @ k.float() * scale + bias.float()
    return found.masked_fill(torch.ones(tokens, tokens, device=q.device).triu(1).bool(), -math.inf)


def flash_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seed: None,
    logit_bias: torch.Tensor,
    softmax_scale: float,
    config: None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    assert options == {"use_causal_mask": True, "mixed_precision": True, "dropout_p": 0.0} and seed is None
    row, heads, features, tokens = q.shape
    assert row == 1 and k.shape == q.shape and v.shape == (1, heads, tokens, features)
    found = scores(q, k, logit_bias, softmax_scale)
    lse = found.logsumexp(-1).view(1, heads, -1, min(PARTITIONS, tokens)).transpose(2, 3)
    return (found.softmax(-1) @ v.float()).to(q.dtype), lse


def flash_attn_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    dy: torch.Tensor,
    lse: torch.Tensor,
    seed: None,
    logit_bias_ref: torch.Tensor,
    softmax_scale: float,
    **_: Any,
) -> tuple[torch.Tensor, ...]:
    """Dao 2023 (FlashAttention-2, arXiv:2307.08691), section 2.1. All tensors [rows, heads, features, tokens]."""
    assert len({each.shape for each in (q, k, v, o, dy)}) == len({each.dtype for each in (q, k, v, o, dy)}) == 1
    dtype, (heads, tokens) = q.dtype, (q.shape[1], q.shape[3])
    q, k, v, o, dy = (each.float() for each in (q, k, v, o, dy))
    sums = lse.transpose(2, 3).reshape(1, heads, tokens, 1)
    weights = (scores(q, k, logit_bias_ref, softmax_scale) - sums).exp()
    of_weights = dy.transpose(2, 3) @ v
    of_scores = weights * (of_weights - (dy * o).sum(2).unsqueeze(-1))
    of_query, of_key = k @ of_scores.transpose(2, 3), q @ of_scores
    found = (of_query * softmax_scale, of_key * softmax_scale, dy @ weights)
    return tuple(each.to(dtype) for each in found)


def reference_kernels() -> Kernels:
    return Kernels(Launched(flash_fwd), Launched(flash_attn_bwd))
