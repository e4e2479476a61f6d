"""training.attention: isolatedFlash. Neuron's flash attention with a mask, which keeps packed examples apart.

optimum-neuron calls the flash kernels of NKI without a mask. They take a bias that is added to the scores of one row
(``logit_bias``: aws-neuron/nki-samples, reference/attention.py, since Neuron SDK 2.21).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# The bias of a position that is not attended to: what the kernel itself writes there in its backward pass. In fp32
# exp(-9984) is 0, and the number has an exact bf16 value.
MASKED = -9984.0


class Kernels(NamedTuple):
    """Both take a launch grid of (rows, heads) and then their arguments: ``forward[1, heads](query, ...)``."""

    forward: Any
    backward: Any
    config: Any = None  # of the forward kernel


def nki_kernels() -> Kernels:
    """Those of neuronx-cc, with the type of the log-sum-exp that NeuronX Distributed chooses.

    NxD 0.15, kernels/flash_attn.py, _flash_attn_forward.
    """
    from neuronx_distributed.kernels.flash_attn import FlashConfig, get_flash_attn_kernels
    from neuronx_distributed.kernels.kernel_utils import check_xla_bf16_flags

    forward, backward, _ = get_flash_attn_kernels()
    return Kernels(forward, backward, FlashConfig(lse_dtype="bfloat16") if check_xla_bf16_flags() else None)


class _FlashRow(torch.autograd.Function):
    """Attention of one row, with a bias on its scores.

    query, key, value and the result: [1, heads, tokens, features]. bias: [1, 1, tokens, tokens], without a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
        scale: float,
        kernels: Kernels,
    ) -> torch.Tensor:
        q, k = query.transpose(2, 3), key.transpose(2, 3)
        launched = kernels.forward[1, query.shape[1]]
        settings = {"softmax_scale": scale, "use_causal_mask": True, "mixed_precision": True, "dropout_p": 0.0}
        result, log_sum_exp = launched(q, k, value, None, logit_bias=bias, config=kernels.config, **settings)
        ctx.save_for_backward(q, k, value, bias, result, log_sum_exp)
        ctx.kernels, ctx.settings = kernels, settings
        output: torch.Tensor = result.to(query.dtype)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, value, bias, result, log_sum_exp = ctx.saved_tensors
        (gradient,) = gradients
        features_first = (q, k, *(each.transpose(2, 3) for each in (value, result, gradient)))
        launched = ctx.kernels.backward[1, q.shape[1]]
        found = launched(*features_first, log_sum_exp, None, logit_bias_ref=bias, **ctx.settings)
        of_query, of_key, of_value = (each.transpose(2, 3) for each in found)
        return of_query, of_key, of_value, None, None, None


def flash_attention(kernels: Kernels, repeat_kv: Callable[[torch.Tensor, int], torch.Tensor]) -> Callable[..., Any]:
    """A function in place of optimum-neuron's ``eager_attention_forward``.

    ``mask`` [rows, 1, tokens, tokens] is 0 where a token attends and MASKED elsewhere. The kernels add it to the scores
    of one row at a time, so each row of the micro-batch is a call.
    """

    def forward(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        key, value = (repeat_kv(each, module.num_key_value_groups) for each in (key, value))
        rows = (each.split(1) for each in (query, key, value, mask))
        return torch.cat([_FlashRow.apply(*row, scaling, kernels) for row in zip(*rows, strict=True)]), None

    return forward
