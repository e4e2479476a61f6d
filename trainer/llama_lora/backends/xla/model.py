"""The base model, split over the workers of a tensor-parallel group, with LoRA: optimum-neuron's model in bf16."""

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
from optimum.neuron.models.training.llama.modeling_llama import repeat_kv
from optimum.neuron.peft import NeuronPeftModelForCausalLM, get_peft_model
from torch_xla.utils.checkpoint import checkpoint

from genvalues.accelerators.architectures import MODEL_TYPES, target_names
from genvalues.common.errors import UserError
from genvalues.common.text import number_of
from llama_lora import library_versions
from llama_lora.backends.lora import initial_a, lora_config
from llama_lora.backends.xla.flash import flash_attention, nki_kernels
from llama_lora.backends.xla.shards import query_heads
from llama_lora.config import Lora, Parallelism, Training
from llama_lora.model_files import COMPLETE, base_files
from llama_lora.safetensors_files import stored_tensors

# The attention function of optimum-neuron's models. They look it up by name in their module.
ATTENTION = "eager_attention_forward"
MODELS = [import_module(f"optimum.neuron.models.training.{name}.modeling_{name}") for name in MODEL_TYPES]
MODELS_WITH_ATTENTION = [module for module in MODELS if hasattr(module, ATTENTION)]
# Layers that optimum-neuron fuses share one factor A. It gets the initial values of the first of them.
FUSED = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}


def neuron_config(parallelism: Parallelism, training: Training) -> Any:
    """Build optimum-neuron's parallel config. Joins the process group and creates the parallel groups."""
    return TrainingNeuronConfig(
        tensor_parallel_size=parallelism.tensor_parallel_size,
        # Always on with tensor parallelism: without it the gradients summed over the group are a copy in bf16.
        sequence_parallel_enabled=parallelism.tensor_parallel_size > 1,
        gradient_checkpointing=training.activation_checkpointing == "full",
        # True ignores the mask that isolates packed examples.
        recompute_causal_mask=training.attention == "causal",
    )


def load_parallel_model(
    path: Path, trn_config: Any, lora: Lora, training: Training, adapter: Path | None = None
) -> Any:
    """Load this worker's part of the model on its core, with a new adapter or the one in the folder ``adapter``.

    Base model and adapter are in bf16; the optimizer keeps fp32 weights of the adapter.
    """
    base_files(path)
    stored_tensors(path)  # and nothing beside them
    if training.attention == "isolatedFlash":
        use_masked_flash()
    elif training.activation_checkpointing == "selective":
        recompute_attention()
    model, loading = NeuronModelForCausalLM.from_pretrained(
        str(path),
        trn_config,
        **library_versions.LOCAL,
        use_safetensors=True,
        dtype=torch.bfloat16,
        attn_implementation="flash_attention_2" if training.attention == "causal" else "eager",
        # Else optimum-neuron 0.4.5 draws random values for all fused layers before it reads them: it compares the names
        # of its own layers with those in the files.
        _fast_init=False,
        output_loading_info=True,
    )
    if missing := loading["missing_keys"]:
        what = f"{number_of(len(missing), 'weight')} not found: {', '.join(sorted(missing)[:3])}"
        raise UserError(what, where=str(path), fix=COMPLETE)
    if training.activation_checkpointing == "full":
        model.enable_input_require_grads()  # a layer is recomputed only if its input requires a gradient
        model.gradient_checkpointing_enable({})
    if adapter:
        model = NeuronPeftModelForCausalLM.from_pretrained(model, str(adapter), is_trainable=True)
    else:
        named = lora.model_copy(update={"target_modules": target_names(lora.target_modules)})
        model = get_peft_model(model, lora_config(named))
        initialize_parts(model, training.seed)
    model.config.use_cache = False
    for parameter in model.parameters():
        # The library uses model.to(), which also rounds the rotary frequencies (a buffer) to bf16. An error of 0.3 % in
        # a frequency is an angle of 3.7 at position 2047, so positions would differ from the base model's.
        parameter.data = parameter.data.to(torch.bfloat16)
    move_model_to_device(model, torch_xla.device())
    model.tie_weights()
    torch_xla.sync()
    return model.train()


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """This worker's parameters of the adapter, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def is_cut(parameter: torch.nn.Parameter) -> bool:
    """Whether the parameter is split over the tensor-parallel group; otherwise all workers hold the same values."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def initialize_parts(model: Any, seed: int) -> None:
    """Initialize this worker's parts of the LoRA factors A (lora.initial_a).

    The library's initialization uses the same seed on all workers of a group, and so the same values for different
    columns.
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
    """Reorder the columns of o_proj's factor A to the workers' order of query heads with replicated kv heads."""
    heads = model_config.num_attention_heads
    order = query_heads(heads, model_config.num_key_value_heads, attention.kv_size_multiplier)
    return factor.view(factor.shape[0], heads, -1)[:, order].reshape(factor.shape)


def use_masked_flash() -> None:
    """Compute the attention of packed examples with the flash kernel. It keeps no scores, so none are recomputed."""
    replacement = flash_attention(nki_kernels(), repeat_kv)
    for module in MODELS_WITH_ATTENTION:
        setattr(module, ATTENTION, replacement)


def recompute_attention() -> None:
    """Selective activation checkpointing (Korthikanti et al. 2022, arXiv:2205.05198, section 5): the backward pass
    recomputes only the attention of a layer, so that no tensor of [heads, tokens, tokens] is stored.

    optimum-neuron supports only whole layers. Flash attention stores no such tensor and is not wrapped.
    """
    for module in MODELS_WITH_ATTENTION:
        attention = getattr(module, ATTENTION)
        if not getattr(attention, "recomputes", False):
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
