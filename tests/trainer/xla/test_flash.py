"""training.attention: isolatedFlash, with PyTorch computing what the documentation of NKI's kernels says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llama_lora.backends.xla.flash import MASKED, flash_attention
from llama_lora.data.batches import isolating_mask
from trainer.xla.reference_flash import reference_kernels

HEADS, KEY_HEADS, TOKENS, FEATURES = 4, 2, 256, 16


def repeat_kv(heads: torch.Tensor, times: int) -> torch.Tensor:
    return heads.repeat_interleave(times, dim=1)


@pytest.mark.parametrize("rows", [1, 2])
def test_packed_examples_attend_only_to_themselves(rows: int) -> None:
    """Result and gradients of each row equal those of its examples computed one by one with PyTorch's attention."""
    lengths = [[100, 1, 155], [17, 200, 39]][:rows]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, HEADS, TOKENS, FEATURES, generator=generator, requires_grad=True)
    key, value = (torch.randn(rows, KEY_HEADS, TOKENS, FEATURES, generator=generator, requires_grad=True) for _ in "kv")
    given = torch.randn(rows, HEADS, TOKENS, FEATURES, generator=generator)

    examples = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
    mask = torch.where(isolating_mask(examples), 0.0, MASKED)
    kernels = reference_kernels()
    attention = flash_attention(kernels, repeat_kv)
    module = SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS)
    found, weights = attention(module, query, key, value, mask, FEATURES**-0.5, dropout=0.0, causal=False)
    assert weights is None
    gradients = torch.autograd.grad(found, (query, key, value), given)

    expected = torch.empty_like(found)
    for row, ends in enumerate(lengths):
        for part in torch.arange(TOKENS).split(ends):
            q, k, v = query[row, :, part], *(repeat_kv(each[row : row + 1, :, part], 2)[0] for each in (key, value))
            expected[row, :, part] = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients, torch.autograd.grad(expected, (query, key, value), given), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert kernels.forward.grids == kernels.backward.grids == [(1, HEADS)] * rows


def test_the_bias_is_exact_in_bf16_and_hides_a_position_whatever_its_score() -> None:
    bias = torch.tensor(MASKED, dtype=torch.bfloat16).float()
    assert bias == MASKED
    assert torch.exp(bias + 9000) == 0
