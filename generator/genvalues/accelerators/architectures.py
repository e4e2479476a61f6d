"""Model architectures: which model types can be trained, their sizes from config.json, and parameter counts.

Names and formulas follow transformers' Llama, Qwen3 and Granite (modeling_llama.py, ...), which optimum-neuron 0.4.5
splits over its workers. No torch here: a test builds every model of the table on torch's meta device and compares.

To add a model type, add an entry to MODEL_TYPES and a row with its models to architectures.json.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

TABLE = Path(__file__).with_name("architectures.json")


class ModelType(NamedTuple):
    """A model type that optimum-neuron trains with tensor parallelism, and where it differs from Llama."""

    model_class: str  # architectures in config.json
    models: str  # for messages
    default_head: int | None = None  # features of a head where config.json has no head_dim; None: hidden size / heads
    normalizes_heads: bool = False  # an RMSNorm on each head of query and key
    splits_vocabulary: bool = True  # embedding and output layer are split over the workers


# By model_type in config.json: those that optimum/neuron/models/training/auto_models.py registers for text-generation.
MODEL_TYPES = {
    "llama": ModelType("LlamaForCausalLM", "Llama 3, 3.1, 3.2 and 3.3"),
    # transformers: Qwen3Config (head_dim 128) and Qwen3Attention (q_norm, k_norm).
    "qwen3": ModelType("Qwen3ForCausalLM", "Qwen3", default_head=128, normalizes_heads=True),
    # optimum-neuron's GraniteModel keeps torch's own embedding and output layer, whole on every worker.
    "granite": ModelType("GraniteForCausalLM", "Granite 3", splits_vocabulary=False),
}


class LinearLayer(NamedTuple):
    """A linear layer of a decoder layer: its block, and the Architecture attributes with its features."""

    block: str
    inputs: str
    outputs: str


# The linear layers that LoRA can target, by the base model's names (transformers: LlamaAttention, LlamaMLP). Embeddings
# and lm_head could be targets too, except Granite's; consolidate and merge support only linear layers.
LINEAR = {
    "q_proj": LinearLayer("self_attn", "hidden", "query"),
    "k_proj": LinearLayer("self_attn", "hidden", "key"),
    "v_proj": LinearLayer("self_attn", "hidden", "key"),
    "o_proj": LinearLayer("self_attn", "query", "hidden"),
    "gate_proj": LinearLayer("mlp", "hidden", "intermediate"),
    "up_proj": LinearLayer("mlp", "hidden", "intermediate"),
    "down_proj": LinearLayer("mlp", "intermediate", "hidden"),
}
QUERY_KEY_VALUE, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")  # fused by optimum-neuron


class UnknownArchitecture(ValueError):
    """A config.json without the sizes of a Llama-like decoder. The message names the key."""


@dataclass(frozen=True)
class Architecture:
    """The sizes of a Llama-like decoder. ``head`` is features per head, ``positions`` the longest row."""

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    positions: int
    tied: bool  # the output layer shares the embedding's weights
    attention_bias: bool = False
    mlp_bias: bool = False
    quantized: bool = False
    sliding_window: int | None = None
    model_class: str = ""  # architectures in config.json

    @property
    def supported(self) -> ModelType | None:
        """The model type's entry; None for a model that optimum-neuron cannot train."""
        found = MODEL_TYPES.get(self.model_type)
        return found if found and self.model_class in ("", found.model_class) else None

    @property
    def query(self) -> int:
        """Features of all query heads."""
        return self.heads * self.head

    @property
    def key(self) -> int:
        """Features of all key heads; value heads have as many."""
        return self.kv_heads * self.head

    @property
    def normalizes_heads(self) -> bool:
        return self.model_type in MODEL_TYPES and MODEL_TYPES[self.model_type].normalizes_heads

    @property
    def splits_vocabulary(self) -> bool:
        return self.model_type not in MODEL_TYPES or MODEL_TYPES[self.model_type].splits_vocabulary

    def linear(self, name: str) -> tuple[int, int]:
        """(in, out) features of a linear layer of a decoder layer."""
        layer = LINEAR[name]
        return getattr(self, layer.inputs), getattr(self, layer.outputs)

    @property
    def layer_linear_parameters(self) -> int:
        """Parameters of the linear layers of one decoder layer, without biases."""
        return sum(inner * outer for inner, outer in map(self.linear, LINEAR))

    @property
    def attention_parameters(self) -> int:
        """Parameters of the attention's linear layers of one decoder layer, without biases."""
        names = (name for name, layer in LINEAR.items() if layer.block == "self_attn")
        return sum(inner * outer for inner, outer in map(self.linear, names))

    @property
    def layer_norm_parameters(self) -> int:
        """Parameters of the norms of one decoder layer."""
        return 2 * self.hidden + (2 * self.head if self.normalizes_heads else 0)

    @property
    def layer_bias_parameters(self) -> int:
        attention = self.query + 2 * self.key + self.hidden if self.attention_bias else 0
        mlp = 2 * self.intermediate + self.hidden if self.mlp_bias else 0
        return attention + mlp

    @property
    def parameters(self) -> int:
        """All parameters, as transformers counts them: a tied output layer counts once."""
        layer = self.layer_linear_parameters + self.layer_norm_parameters + self.layer_bias_parameters
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * layer + self.hidden

    @property
    def matrix_parameters(self) -> int:
        """Parameters that every token is multiplied with: linear layers and output layer, without the embedding."""
        return self.layers * self.layer_linear_parameters + self.vocabulary * self.hidden

    def lora_parameters(self, r: int, targets: Sequence[str]) -> int:
        """As PEFT counts them: A, [r, in], and B, [out, r], of each target (Hu et al. 2021, section 4.1)."""
        return self.layers * sum(r * sum(self.linear(name)) for name in targets)


def target_names(targets: str | Sequence[str]) -> list[str]:
    """The LoRA targets by name.

    ``all-linear`` is spelled out as PEFT understands it, because optimum-neuron's FusedLinearsSpec.adapt_peft_config
    (models/training/transformations_utils.py) fails on the word with an AttributeError.
    """
    return list(LINEAR) if targets == "all-linear" else list(targets)


def from_config(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json. Raises UnknownArchitecture for a missing or invalid key."""
    model_type = str(config.get("model_type"))
    default = MODEL_TYPES[model_type].default_head if model_type in MODEL_TYPES else None

    def size(key: str, otherwise: int | None = None) -> int:
        value = config.get(key) or otherwise
        kind = f"(model_type {model_type[:40]}) " if "model_type" in config else ""
        try:
            number = int(value)  # type: ignore[arg-type]  # whatever is in the file
        except (TypeError, ValueError, OverflowError):
            number = 0
        if number <= 0:
            raise UnknownArchitecture(f"{kind}has no valid {key}")
        return number

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    classes = config.get("architectures") or [""]
    # Qwen3Config ignores a sliding_window unless use_sliding_window is set.
    has_window = config.get("use_sliding_window") and config.get("sliding_window")
    return Architecture(
        model_type=model_type,
        hidden=hidden,
        intermediate=size("intermediate_size"),
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head=size("head_dim", default or hidden // heads),
        vocabulary=size("vocab_size"),
        positions=size("max_position_embeddings"),
        tied=bool(config.get("tie_word_embeddings")),  # false by default in LlamaConfig, Qwen3Config and GraniteConfig
        attention_bias=bool(config.get("attention_bias")),
        mlp_bias=bool(config.get("mlp_bias")),
        quantized=bool(config.get("quantization_config")),
        sliding_window=size("sliding_window") if has_window else None,
        model_class=str(classes[0]) if isinstance(classes, list) else str(classes),
    )


@functools.lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """The rows of architectures.json by name: ``models``, ids on the Hub, and their ``config``."""
    rows: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))["architectures"]
    return rows


def known_config(model_id: str) -> dict[str, Any] | None:
    """The sizes in the config.json of a model in the table, by its id on the Hub."""
    return next((row["config"] for row in table().values() if model_id in row["models"]), None)


def known(model_id: str) -> Architecture | None:
    """The architecture of a model in the table, by its id on the Hub."""
    config = known_config(model_id)
    return from_config(config) if config else None
