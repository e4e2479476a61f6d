"""Eager training on the CPU: linear layers with LoRA, products of bf16, and attention of packed rows.

Devices that compile graphs or have kernels of their own use the modules of PEFT and transformers. The sums are the
same here; they are rounded less often.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from genvalues.common.errors import UserError
from llama_lora.bf16 import is_fast, product


def compute_on_host(lm: nn.Module) -> None:
    """Have the linear layers of a model, whose base weights are frozen, computed by ``FrozenLinear``."""
    from peft.tuners.lora import Linear as LoraLinear

    adapted: list[Any] = [module for module in lm.modules() if isinstance(module, LoraLinear)]
    parts = {part for module in adapted for part in module.modules()}
    others: list[Any] = [module for module in lm.modules() if isinstance(module, nn.Linear) and module not in parts]
    for module in adapted:
        module.forward = functools.partial(_adapted, module)
    for module in others:
        module.forward = functools.partial(_frozen, module)


def _frozen(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = FrozenLinear.apply(x, layer.weight, layer.bias, None, None, None, 0.0)
    return output


def _adapted(layer: Any, x: torch.Tensor) -> torch.Tensor:
    base, a, b = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    dropout = layer.lora_dropout["default"]  # Identity if there is none
    dropped = dropout(x.to(a.dtype)) if layer.training and isinstance(dropout, nn.Dropout) else None
    scaling = layer.scaling["default"]
    output: torch.Tensor = FrozenLinear.apply(x, base.weight, base.bias, dropped, a, b, scaling)
    return output


class FrozenLinear(torch.autograd.Function):
    """x W^T + bias + scaling (d A^T) B^T, where d is x after dropout (None: x), with gradients of x, d, A and B.

    A product is added to another in place. PEFT's Linear reads and writes the whole output once to scale, once to add
    and once to convert it, its gradient as often, and keeps a copy of x in the type of A.
    """

    @staticmethod
    def forward(
        context: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dropped: torch.Tensor | None,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        rows = x.flatten(0, -2)
        output = product(rows, weight.t())
        if bias is not None:
            output += bias
        inner = None
        if a is not None and b is not None:
            inner = (rows if dropped is None else dropped.flatten(0, -2)).to(a.dtype) @ a.t()
            output = output.to(a.dtype).addmm_(inner, b.t(), alpha=scaling).to(x.dtype)
        context.scaling = scaling
        context.save_for_backward(x if dropped is None and a is not None else dropped, weight, a, b, inner)
        context.dropped = dropped is not None
        return output.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        adapter_input, weight, a, b, inner = context.saved_tensors
        shape = gradient.shape[:-1]
        rows = gradient.flatten(0, -2)
        of_x = product(rows, weight) if context.needs_input_grad[0] else None
        of_dropped = of_a = of_b = None
        if a is not None:
            wide = rows.to(a.dtype)
            of_inner = (wide @ b).mul_(context.scaling)
            of_a = of_inner.t() @ adapter_input.flatten(0, -2).to(a.dtype)
            of_b = (wide.t() @ inner).mul_(context.scaling)
            if context.dropped:
                of_dropped = (of_inner @ a).unflatten(0, shape) if context.needs_input_grad[3] else None
            elif of_x is not None:
                of_x = of_x.to(a.dtype).addmm_(of_inner, a).to(rows.dtype)
        return None if of_x is None else of_x.unflatten(0, shape), None, None, of_dropped, of_a, of_b, None


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa. On the CPU, packed examples are computed one after another instead of masked.

    ``attention_mask`` is one of ``isolating_mask``, and then only says where examples begin. A graph cannot depend on
    that, and a device would have to be waited for.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.device.type != "cpu" or torch.compiler.is_compiling():
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output
    if attention_mask is not None and attention_mask.dtype != torch.bool:  # scores of a Doge, for example
        what = f"{type(module).__name__} computes an attention mask of its own, which backend native does not support"
        raise UserError(what, where="model", fix="Use a Llama, Qwen3 or Granite.")
    dtype = query.dtype
    tensors = [tensor if is_fast(dtype) else tensor.float() for tensor in (query, key, value)]
    if attention_mask is None:
        return sdpa_attention_forward(module, *tensors, None, **options)[0].to(dtype), None
    rows = []
    for row, lengths in enumerate(example_lengths(attention_mask)):
        examples = zip(*(tensor[row : row + 1].split(lengths, dim=2) for tensor in tensors), strict=True)
        outputs = [sdpa_attention_forward(module, *example, None, **options)[0] for example in examples]
        rows.append(torch.cat(outputs, dim=1))
    return torch.cat(rows).to(dtype), None


def example_lengths(mask: torch.Tensor) -> list[list[int]]:
    """The lengths of the examples of each row, from a mask of ``isolating_mask``: bool [rows, 1, tokens, tokens].

    An example begins where a token does not see the one before it.
    """
    begins = ~mask[:, 0].diagonal(-1, -2, -1)
    cuts = [[0, *(row.nonzero().squeeze(1) + 1).tolist(), mask.shape[-1]] for row in begins]
    return [[end - start for start, end in pairwise(row)] for row in cuts]
