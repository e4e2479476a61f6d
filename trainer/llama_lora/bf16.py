"""Products of bf16 on a CPU without instructions for them: copies in fp32 are multiplied, and the result is rounded.

PyTorch's own product sums in fp32 too, so results differ by the order of the sums alone. Without the instructions it
takes 3 to 7 times as long from 64 rows on, and 30 times for a gradient with the weight (AVX2, PyTorch 2.15).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

FEW_ROWS = 16  # up to here the copy of the weight takes longer than it saves
COPIED = 1 << 24  # elements of a weight that exist in fp32 at a time: 64 MiB


def is_fast(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of the type as fast as fp32 copies of them."""
    return dtype != torch.bfloat16 or (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The product of two matrices in their type."""
    return one @ other if is_fast(one.dtype) else (one.float() @ other.float()).to(one.dtype)


def speed_up_linear_layers(model: nn.Module) -> None:
    """Have the linear layers of a model compute their forward pass by ``linear``, where that is faster."""
    if is_fast(torch.bfloat16):
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = functools.partial(linear, module)


@torch.no_grad()
def linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """x W^T + bias for x [..., features], without gradients and without an fp32 copy of the whole weight."""
    rows = x.flatten(0, -2)
    if is_fast(x.dtype) or len(rows) <= FEW_ROWS:
        return F.linear(x, layer.weight, layer.bias)
    wide, output = rows.float(), x.new_empty(len(rows), layer.out_features)
    step = max(1, COPIED // layer.in_features)
    for begin in range(0, layer.out_features, step):
        part = slice(begin, begin + step)
        bias = None if layer.bias is None else layer.bias[part].float()
        output[:, part] = F.linear(wide, layer.weight[part].float(), bias)
    return output.unflatten(0, x.shape[:-1])
