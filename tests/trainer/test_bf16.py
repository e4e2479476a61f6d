"""Products of bf16 through fp32, as on a CPU without instructions for bf16, whatever this one has."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llama_lora import bf16


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16, "is_fast", lambda dtype: dtype != torch.bfloat16)


def layer_and_input(rows: int, bias: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(48, 40, bias=bias, dtype=dtype).requires_grad_(False), torch.randn(2, rows // 2, 48, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("copied", [1 << 24, 48 * 7, 1], ids=["whole", "seven rows", "one row"])
def test_a_linear_layer_is_that_of_fp32_rounded_once(copied: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever parts the weight is copied."""
    monkeypatch.setattr(bf16, "COPIED", copied)
    layer, x = layer_and_input(64, bias)
    bf16.speed_up_linear_layers(layer)
    found = layer(x)
    exact = nn.functional.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    assert found.shape == exact.shape and found.dtype == torch.bfloat16
    assert torch.all((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6), "half a unit in the last of 8 bits"


@pytest.mark.parametrize(("rows", "dtype"), [(bf16.FEW_ROWS, torch.bfloat16), (64, torch.float32)])
def test_few_rows_and_other_types_are_left_to_pytorch(rows: int, dtype: torch.dtype) -> None:
    layer, x = layer_and_input(rows, True, dtype)
    expected = layer(x)
    bf16.speed_up_linear_layers(layer)
    assert torch.equal(layer(x), expected)


def test_a_product_is_rounded_to_its_type() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(33, 21, dtype=torch.bfloat16), torch.randn(21, 17, dtype=torch.bfloat16)
    assert torch.equal(bf16.product(one, other), (one.float() @ other.float()).to(torch.bfloat16))
