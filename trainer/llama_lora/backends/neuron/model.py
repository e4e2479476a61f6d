"""A base model cut over the workers of a tensor-parallel group, with LoRA on it: optimum-neuron's model, in bf16."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch_xla
from neuronx_distributed.parallel_layers import parallel_state
from neuronx_distributed.utils.model_utils import move_model_to_device
from optimum.neuron.models.training import NeuronModelForCausalLM
from optimum.neuron.models.training.config import TrainingNeuronConfig
from optimum.neuron.peft import NeuronPeftModelForCausalLM, get_peft_model
from torch_xla.utils.checkpoint import checkpoint

from genvalues.accelerators.architectures import MODEL_TYPES, target_names
from llama_lora.backends.lora import initial_a, lora_config
from llama_lora.backends.neuron.shards import query_heads
from llama_lora.config import Lora, Parallelism, Training

# The attention of optimum-neuron's models, looked up by name where they call it.
ATTENTION = "eager_attention_forward"
MODELS_WITH_ATTENTION = [
    import_module(f"optimum.neuron.models.training.{name}.modeling_{name}") for name in MODEL_TYPES
]
# LoRA on layers that optimum-neuron has fused has one factor A for all of them: it begins as the first one's.
FUSED = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}


def neuron_config(parallelism: Parallelism, training: Training) -> Any:
    """How the model is cut, for optimum-neuron. Joins the process group and makes the parallel groups."""
    return TrainingNeuronConfig(
        tensor_parallel_size=parallelism.tensor_parallel_size,
        # Always on with tensor parallel: without it the gradients that are summed over the group are a copy in bf16.
        sequence_parallel_enabled=parallelism.tensor_parallel_size > 1,
        gradient_checkpointing=training.activation_checkpointing == "full",
        # True drops the mask that keeps packed examples apart.
        recompute_causal_mask=training.attention == "flash",
    )


def load(path: Path, trn_config: Any, lora: Lora, training: Training, adapter: Path | None = None) -> Any:
    """The model on this worker's core, with a new adapter, or with the one in the folder ``adapter``.

    Base and adapter are in bf16; the optimizer keeps the adapter's fp32 weights.
    """
    if training.activation_checkpointing == "selective":
        recompute_attention()
    model = NeuronModelForCausalLM.from_pretrained(
        str(path),
        trn_config,
        dtype=torch.bfloat16,
        attn_implementation="flash_attention_2" if training.attention == "flash" else "eager",
    )
    if training.activation_checkpointing == "full":
        model.enable_input_require_grads()  # a whole layer is recomputed only where its input wants a gradient
        model.gradient_checkpointing_enable({})
    if adapter:
        model = NeuronPeftModelForCausalLM.from_pretrained(model, str(adapter), is_trainable=True)
    else:
        wished = lora.model_copy(update={"target_modules": target_names(lora.target_modules)})
        model = get_peft_model(model, lora_config(wished))
        initialize(model, training.seed)
    model.config.use_cache = False
    for parameter in model.parameters():
        # Not model.to(), as the library does: that rounds the frequencies of the rotary positions, too, which are a
        # buffer. 0.3 % of a frequency is an angle of 3.7 at position 2047: other positions than the base model knows.
        parameter.data = parameter.data.to(torch.bfloat16)
    move_model_to_device(model, torch_xla.device())
    model.tie_weights()
    torch_xla.sync()
    return model.train()


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters that this worker holds, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def is_cut(parameter: torch.nn.Parameter) -> bool:
    """Whether each worker of a tensor-parallel group holds a part of its own; else all hold the same."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def initialize(model: Any, seed: int) -> None:
    """Every LoRA factor A's first values, whatever part of it is here (lora.initial_a).

    The library's own would give the workers of a group, who have the same seed, the same values for different columns.
    """
    size, rank = parallel_state.get_tensor_model_parallel_size(), parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in trainable(model).items():
        if ".lora_A." not in name:
            continue
        peft_name = name.replace(".default.", ".")
        for fused, first in FUSED.items():
            peft_name = peft_name.replace(f".{fused}.", f".{first}.")
        r, columns = parameter.shape
        whole = initial_a(peft_name, (r, columns * size if is_cut(parameter) else columns), seed)
        if ".o_proj." in name:
            whole = in_order_of_heads(whole, model.get_submodule(name.partition(".o_proj.")[0]), model.config)
        part = whole.chunk(size, dim=1)[rank] if is_cut(parameter) else whole
        parameter.data.copy_(part)


def in_order_of_heads(factor: torch.Tensor, attention: Any, model_config: Any) -> torch.Tensor:
    """o_proj's factor A with its columns as the workers hold them, where key/value heads are copied for them."""
    heads = model_config.num_attention_heads
    order = query_heads(heads, model_config.num_key_value_heads, attention.kv_size_multiplier)
    return factor.view(factor.shape[0], heads, -1)[:, order].reshape(factor.shape)


def recompute_attention() -> None:
    """Selective activation checkpointing (Korthikanti et al. 2022, arXiv:2205.05198, section 5): of a layer, the
    attention alone is computed again in the backward pass, which needs no tensor of [heads, tokens, tokens] kept.

    optimum-neuron has only whole layers. Flash attention keeps none anyway, and is not wrapped.
    """
    for module in MODELS_WITH_ATTENTION:
        attention = getattr(module, ATTENTION, None)
        if attention is not None and not getattr(attention, "recomputes", False):
            setattr(module, ATTENTION, _recomputing(attention))


def _recomputing(attention: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, *rest: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        def output(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> torch.Tensor:
            result: torch.Tensor = attention(module, query, key, value, mask, *rest, **options)[0]
            return result

        if not torch.is_grad_enabled() or not (query.requires_grad or key.requires_grad or value.requires_grad):
            return output(query, key, value, mask), None
        return checkpoint(output, query, key, value, mask), None

    forward.recomputes = True  # type: ignore[attr-defined]
    return forward
