"""Which models backend native trains on the CPU: those that it computes as transformers does, and no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_lora.backends.native import rules
from trainer.conftest import make_run

SIZES: dict[str, Any] = {
    **{"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
}


@pytest.fixture
def refusals(tmp_path: Path) -> Callable[..., str]:
    """The problems of a run with rows of 128 tokens and a model with this config.json."""

    def refusals(model_type: str, training: dict[str, Any] | None = None, **settings: Any) -> str:
        model = tmp_path / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps({"model_type": model_type, **SIZES, **settings}))
        run = make_run(tmp_path / "run", model, training=training or {})
        return "\n".join(map(str, rules.check(run.load(), model)))

    return refusals


ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
USED = {"use_sliding_window": True, "max_window_layers": 1}
WINDOWS: dict[str, dict[str, Any]] = {
    **{"mistral": {}, "starcoder2": {}, "exaone4": {}, "cwm": {}, "qwen2": USED, "qwen3": USED},
    **{"olmo3": ALTERNATING, "gemma3_text": ALTERNATING, "ministral": ALTERNATING | {"head_dim": 8}},
}


@pytest.mark.parametrize("attention", ["isolated", "causal"])
@pytest.mark.parametrize("model_type", WINDOWS)
def test_rows_longer_than_a_models_sliding_window_are_refused(
    refusals: Callable[..., str], model_type: str, attention: str
) -> None:
    """They would be trained, probed and scored with another attention than the model's."""
    told = refusals(model_type, {"attention": attention}, sliding_window=127, **WINDOWS[model_type])
    assert told.startswith("training.maxSequenceLength: ") and "sliding window of 127" in told
    assert "Use 127 or less." in told
    assert not refusals(model_type, sliding_window=128, **WINDOWS[model_type])


def test_a_window_that_no_layer_uses_is_allowed(refusals: Callable[..., str]) -> None:
    assert not refusals("llama", sliding_window=8)  # no key of a Llama
    assert not refusals("qwen2", sliding_window=8, use_sliding_window=False)
    assert not refusals("qwen3", sliding_window=8, use_sliding_window=True, max_window_layers=2)
    assert not refusals("mistral", sliding_window=None)
    assert not refusals("gemma3_text", sliding_window=8, layer_types=["full_attention"] * 2)


def test_a_window_that_config_json_leaves_to_transformers_counts(refusals: Callable[..., str]) -> None:
    told = refusals("mistral", {"maxSequenceLength": 8192}, max_position_embeddings=8192)
    assert "sliding window of 4096" in told


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized weights"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not divisible by num_key_value_heads 3"),
    ],
)
def test_the_rules_of_weights_are_those_of_every_model(
    refusals: Callable[..., str], settings: dict[str, Any], words: str
) -> None:
    for model_type in ("llama", "qwen2"):
        assert words in refusals(model_type, **settings)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}),
    ],
)
def test_a_model_whose_attention_sdpa_cannot_compute_is_refused_by_its_class(
    refusals: Callable[..., str], model_type: str, settings: dict[str, Any]
) -> None:
    """transformers raises a ValueError for it, but only where a later stage loads the model."""
    told = refusals(model_type, sliding_window=512, **settings)
    assert told.startswith("model: ") and "SDPA" in told and "ForCausalLM does not support" in told


def test_a_model_with_weights_outside_a_llamas_parts_is_refused(refusals: Callable[..., str]) -> None:
    """Gemma 4 embeds a token for each layer: evaluate reads the weights of a Llama's parts only."""
    told = refusals("gemma4_text", head_dim=8, sliding_window=512)
    assert told.startswith("model: ") and "the parts of a Llama; gemma4_text has others" in told


LINEAR_ATTENTION = {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("qwen3_5_text", LINEAR_ATTENTION),
        ("granitemoehybrid", {"num_local_experts": 0, "mamba_n_heads": 4, "layer_types": ["mamba", "attention"]}),
    ],
)
def test_examples_are_not_packed_for_a_model_whose_layers_carry_one_into_the_next(
    refusals: Callable[..., str], model_type: str, settings: dict[str, Any]
) -> None:
    """A mask isolates examples in attention only."""
    told = refusals(model_type, **settings)
    assert told.startswith("training.packing: linear_attention layers") and "Write packing: false" in told
    assert not refusals(model_type, {"packing": False}, **settings)
    assert not refusals(model_type, {"attention": "causal"}, **settings)  # which isolates nothing
