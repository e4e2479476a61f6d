"""The model that native trains: a transformers model with a PEFT adapter, and its loss.

It is built without memory (on the meta device), so that layout.py can split it before any weight is read, and each
worker then reads its own part of the base weights only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from llama_lora import library_versions
from llama_lora.adapter import PREFIX
from llama_lora.backends.lora import initial_a, lora_config
from llama_lora.backends.native.host import attention
from llama_lora.backends.native.regions import StoredWeights, local_region, local_tensor
from llama_lora.config import Lora
from llama_lora.data.batches import isolating_mask, pad_rows
from llama_lora.data.tokens import IGNORED

LOSS_CHUNK = 256  # tokens whose logits exist at once
# transformers' sdpa under another name: for a name without a mask function, transformers builds no mask and does not
# look for packed rows, which reads values back from the device (masking_utils, _preprocess_mask_arguments).
ATTENTION = "llama_lora_sdpa"
# What wrappers put into parameter names: activation checkpointing, torch.compile, and PEFT's name of the adapter.
WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


class ModelBatch(NamedTuple):
    """Inputs of ``SummedLoss``, on its device.

    - ``input_ids``, ``position_ids``: int64 [rows, tokens]
    - ``attention_mask``: bool [rows, 1, tokens, tokens], True = attend; None for causal attention over the whole row
    - ``targets``: int64 [positions], the label of the next token; IGNORED has no loss
    - ``positions``: int64 [positions], indices into rows x tokens that have a target; None for all of them
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    targets: torch.Tensor
    positions: torch.Tensor | None


def make_batch(rows: Sequence[dict[str, Any] | None], length: int | None, isolated: bool) -> ModelBatch:
    """Build a batch on the CPU. None is a row of padding.

    With ``length`` every batch has the same shape: rows padded to it, and a target at each position. Without, rows are
    padded to the longest, and positions without a label are left out, because logits at them are wasted work.
    """
    padded = pad_rows(rows, length or max(len(row["input_ids"]) if row else 1 for row in rows), isolated)
    targets = F.pad(padded.labels[:, 1:], (0, 1), value=IGNORED).flatten()
    positions = None if length else (targets != IGNORED).nonzero().squeeze(1)
    return ModelBatch(
        input_ids=padded.input_ids,
        position_ids=padded.position_ids,
        attention_mask=isolating_mask(padded.example) if isolated else None,
        targets=targets if positions is None else targets[positions],
        positions=positions,
    )


def to_device(batch: ModelBatch, device: torch.device) -> ModelBatch:
    return ModelBatch(*(None if tensor is None else tensor.to(device) for tensor in batch))


class SummedLoss(nn.Module):
    """A causal language model as batch -> summed cross entropy, in nats and fp32.

    Logits exist for one chunk of tokens at a time: whole logits of 2048 tokens over a vocabulary of 128,256 take 1 GB
    in fp32.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm
        self.logits_scaling = float(getattr(lm.config, "logits_scaling", 1.0))  # GraniteForCausalLM divides by it

    def forward(self, batch: ModelBatch) -> torch.Tensor:
        hidden = self.lm.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        ).last_hidden_state.flatten(0, 1)
        if batch.positions is not None:
            if not len(batch.positions):  # only padding; the sum keeps a graph for backward()
                return hidden.float().sum() * 0
            hidden = hidden[batch.positions]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for part, targets in zip(hidden.split(LOSS_CHUNK), batch.targets.split(LOSS_CHUNK), strict=True):
            total = total + LossOfChunk.apply(part, targets, self.chunk_loss)
        return total

    def chunk_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.lm.lm_head(hidden).float()
        if self.logits_scaling != 1.0:
            logits = logits / self.logits_scaling
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


class LossOfChunk(torch.autograd.Function):
    """``loss(hidden, targets)``, whose gradient the forward pass takes while the logits exist.

    The output layer is frozen, so that the gradient of ``hidden`` is all that the backward pass needs. Logits that are
    computed again there cost a third product with the vocabulary (Liger Kernel, arXiv:2410.10989).
    """

    @staticmethod
    def forward(
        context: Any, hidden: torch.Tensor, targets: torch.Tensor, loss: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        if not context.needs_input_grad[0]:  # the probe
            return loss(hidden, targets)
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            value = loss(hidden, targets)
        context.save_for_backward(*torch.autograd.grad(value, hidden))
        return value.detach()

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (of_value,), (gradient,) = gradients, context.saved_tensors
        return gradient * of_value, None, None


class LoraModel(NamedTuple):
    """The loss module, and PEFT's config of the adapter in it."""

    root: SummedLoss
    adapter_config: Any


def build_model(config: Any, lora: Lora, dtype: torch.dtype) -> LoraModel:
    """Build the model of a transformers config, with an fp32 adapter. Parameters are meta tensors, buffers are real."""
    from accelerate import init_empty_weights
    from peft import get_peft_model
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attention)
    with init_empty_weights(include_buffers=False):
        model = library_versions.new_model(config, attn_implementation=ATTENTION, dtype=dtype)
        peft_model = get_peft_model(model, lora_config(lora), low_cpu_mem_usage=True)
    lm = peft_model.get_base_model()  # peft's wrapper is not called: it only adds hooks
    lm.tie_weights()  # not within init_empty_weights, which makes a parameter of its own of each that is assigned
    return LoraModel(SummedLoss(lm), peft_model.peft_config["default"])


def adapter_parameters(root: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by PEFT's names, which depend on no wrapper."""
    return {
        PREFIX + _name(name).replace(".default.", "."): parameter
        for name, parameter in root.named_parameters()
        if parameter.requires_grad
    }


def base_parameters(root: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen parameters by the base model's names."""
    return {
        _name(name).replace(".base_layer.", "."): parameter
        for name, parameter in root.named_parameters()
        if not parameter.requires_grad
    }


def _name(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("lm.")


def materialize(root: SummedLoss, device: torch.device, weights: StoredWeights, seed: int) -> None:
    """Allocate this worker's parameters on ``device``, read its part of the base weights and initialize the adapter.

    The adapter's initial values depend on the seed and the names only, so they are the same for any layout.
    """
    allocate(root, device)
    with torch.no_grad():
        for name, parameter in base_parameters(root).items():
            weights.read_into(local_tensor(parameter), name, local_region(parameter))
        for name, parameter in adapter_parameters(root).items():
            local, region = local_tensor(parameter), local_region(parameter)
            if ".lora_A." in name:
                local.copy_(region.of(initial_a(name, parameter.shape, seed)))
            else:
                local.zero_()


def allocate(root: SummedLoss, device: torch.device) -> None:
    """Allocate parameters that are on the meta device, uninitialized. Buffers keep their values."""
    buffers = dict(root.named_buffers())
    tied = root.lm.lm_head.weight is root.lm.model.embed_tokens.weight
    root.to_empty(device=device)
    set_buffers(root, buffers)
    if tied:
        root.lm.lm_head.weight = root.lm.model.embed_tokens.weight


def move_buffers(root: nn.Module, device: torch.device) -> None:
    """Move the buffers, which have values, to ``device``.

    fully_shard would assign to their ``data``, which needs tensors of compatible device types: not every device is.
    """
    set_buffers(root, {name: buffer.to(device) for name, buffer in root.named_buffers()})


def set_buffers(root: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    for name, buffer in buffers.items():
        module, _, leaf = name.rpartition(".")
        root.get_submodule(module)._buffers[leaf] = buffer
