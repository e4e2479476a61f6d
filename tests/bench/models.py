"""Random models and adapters of any size, made in a process of their own."""

from __future__ import annotations

from typing import Any

# https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json: 1.24 B parameters
LLAMA_1B: dict[str, Any] = {
    **{"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
}
# https://huggingface.co/HuggingFaceTB/SmolLM2-135M/blob/main/config.json: 135 M parameters
SMOLLM2: dict[str, Any] = {
    **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
    **{"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
}
TINY = SMOLLM2 | {"vocab_size": 1024, "hidden_size": 144, "intermediate_size": 384, "num_hidden_layers": 4}
Q_V = ["q_proj", "v_proj"]
ALL_LINEAR = [*Q_V, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_model(folder: str, shape: dict[str, Any], dtype: str, adapters: dict[str, list[str]]) -> None:
    """Write a random Llama, and for each folder in ``adapters`` an adapter of rank 16 for those modules."""
    import torch
    from accelerate import init_empty_weights
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(LlamaConfig(**shape)).to(getattr(torch, dtype))
    model.to_empty(device="cpu")
    model.tie_weights()
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0) if "norm" in name else parameter.data.normal_(std=0.02)
    model.save_pretrained(folder, max_shard_size="1GB")
    for adapter, targets in adapters.items():
        tuned = get_peft_model(model, LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM"))
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        tuned.save_pretrained(adapter)
        model = tuned.unload()
