"""A model's sizes, from its config.json, and what follows from them alone: parameters, and what Neuron can train.

The names and formulas are those of transformers' Llama, Qwen3 and Granite (modeling_llama.py and its like), which
optimum-neuron 0.4.5 cuts over its workers. No torch here: a test builds every model of the table on torch's meta device
and compares the counts.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("architectures.json")
MODEL_CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "granite": "GraniteForCausalLM"}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder as Llama has it. ``head`` is a head's width, ``positions`` the longest row it knows."""

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    positions: int
    tied: bool  # the embedding is the output layer, too
    attention_bias: bool = False
    mlp_bias: bool = False
    quantized: bool = False
    sliding_window: int | None = None
    model_class: str = ""  # what config.json says under architectures

    @property
    def query(self) -> int:
        """Features of all query heads together."""
        return self.heads * self.head

    @property
    def key(self) -> int:
        """Features of all key heads together; of value heads as many."""
        return self.kv_heads * self.head

    @property
    def normalizes_heads(self) -> bool:
        """Qwen3 has a norm on each head of query and key (transformers, Qwen3Attention)."""
        return self.model_type == "qwen3"

    def linear(self, name: str) -> tuple[int, int]:
        """(in, out) features of a linear layer of a decoder layer."""
        features = {
            "q_proj": (self.hidden, self.query),
            "k_proj": (self.hidden, self.key),
            "v_proj": (self.hidden, self.key),
            "o_proj": (self.query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }
        return features[name]

    @property
    def layer_linear_parameters(self) -> int:
        """Of the linear layers of one decoder layer, without biases."""
        return sum(inner * outer for inner, outer in map(self.linear, LINEAR))

    @property
    def layer_norm_parameters(self) -> int:
        """Of the norms of one decoder layer."""
        return 2 * self.hidden + (2 * self.head if self.normalizes_heads else 0)

    @property
    def layer_bias_parameters(self) -> int:
        attention = self.query + 2 * self.key + self.hidden if self.attention_bias else 0
        mlp = 2 * self.intermediate + self.hidden if self.mlp_bias else 0
        return attention + mlp

    @property
    def parameters(self) -> int:
        """As transformers counts them: a tied output layer is not counted again."""
        layer = self.layer_linear_parameters + self.layer_norm_parameters + self.layer_bias_parameters
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * layer + self.hidden

    @property
    def matrix_parameters(self) -> int:
        """Those that every token is multiplied with: all linear layers and the output layer, not the embedding."""
        return self.layers * self.layer_linear_parameters + self.vocabulary * self.hidden

    def lora_parameters(self, r: int, targets: Sequence[str]) -> int:
        """As PEFT counts them: for each targeted layer A, [r, in], and B, [out, r] (Hu et al. 2021, section 4.1)."""
        return self.layers * sum(r * sum(self.linear(name)) for name in targets)

    @property
    def refusals(self) -> list[tuple[str, str]]:
        """(why optimum-neuron 0.4.5 does not train it, what to do): as in backends/neuron/rules.py."""
        found = []
        if self.model_type not in MODEL_CLASSES or self.model_class not in ("", MODEL_CLASSES[self.model_type]):
            found.append(
                (
                    f"{self.model_class or self.model_type} is none of the models that optimum-neuron 0.4.5 trains",
                    "Use a Llama 3, 3.1, 3.2 or 3.3, a Qwen3 or a Granite.",
                )
            )
        biases = [name for name, there in (("attention", self.attention_bias), ("mlp", self.mlp_bias)) if there]
        if biases:
            found.append(
                (f"its {' and '.join(biases)} layers have biases, which optimum-neuron leaves out", "Use one without.")
            )
        if self.quantized:
            found.append(("its weights are quantized, which optimum-neuron does not read", "Use its bf16 weights."))
        if self.model_type == "qwen3" and self.sliding_window:
            found.append(
                (f"it has a sliding window of {self.sliding_window}, which optimum-neuron has not", "Use another.")
            )
        if self.hidden % self.heads:
            found.append((f"its {self.heads} heads do not divide its hidden size {self.hidden}", "Use another model."))
        if self.heads % self.kv_heads:
            found.append(
                (f"its {self.kv_heads} key-value heads do not divide {self.heads} heads", "Use another model.")
            )
        return found


def target_names(wished: str | Sequence[str]) -> list[str]:
    """The layers that get LoRA, by name; all-linear is all seven, in PEFT as in the Neuron backend."""
    return list(LINEAR) if wished == "all-linear" else [name for name in LINEAR if name in wished]


def from_config(config: Mapping[str, Any]) -> Architecture | None:
    """The architecture of a config.json; None where it is of another kind, or a size is missing or senseless."""
    try:
        model_type = str(config["model_type"])
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        # Qwen3Config has heads of 128 where config.json says nothing; Llama and Granite divide.
        head = config.get("head_dim") or (128 if model_type == "qwen3" else hidden // heads)
        classes = config.get("architectures") or [""]
        tied_by_default = False  # LlamaConfig, Qwen3Config and GraniteConfig
        found = Architecture(
            model_type=model_type,
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head=int(head),
            vocabulary=int(config["vocab_size"]),
            positions=int(config["max_position_embeddings"]),
            tied=bool(config.get("tie_word_embeddings", tied_by_default)),
            attention_bias=bool(config.get("attention_bias")),
            mlp_bias=bool(config.get("mlp_bias")),
            quantized=bool(config.get("quantization_config")),
            sliding_window=(config.get("sliding_window") or None) if config.get("use_sliding_window") else None,
            model_class=str(classes[0]),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError, IndexError, OverflowError):
        return None
    sizes = (found.hidden, found.intermediate, found.layers, heads, found.kv_heads, found.head, found.vocabulary)
    return found if min(sizes) > 0 and found.positions > 0 else None


@functools.lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return read


def known(model_id: str) -> Architecture | None:
    """The architecture of a model of the table, by its id on the Hub."""
    name = table()["models"].get(model_id)
    return from_config(table()["configs"][name]) if name else None
