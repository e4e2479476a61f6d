"""Sizes and parameter counts of the table's models, against transformers and PEFT on torch's meta device."""

from __future__ import annotations

import json
from typing import Any

import pytest

from genvalues.accelerators.architectures import LINEAR, Architecture, from_config, known, table, target_names

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

CONFIGS: dict[str, dict[str, Any]] = table()["configs"]
# As the models' pages on the Hub have them (the sum of their safetensors), or their papers.
PUBLISHED = {
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "ibm-granite/granite-3.3-8b-instruct": 8_170_864_640,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
}


def built(config: dict[str, Any]) -> Any:
    """The model, with no memory behind its tensors."""
    kind = {**config}
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(kind.pop("model_type"), **kind)
        )


def architecture(config: dict[str, Any]) -> Architecture:
    found = from_config(config)
    assert found is not None
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_transformers(name: str) -> None:
    model = built(CONFIGS[name])
    assert architecture(CONFIGS[name]).parameters == model.num_parameters()


VARIANTS = {
    "attention bias": {**CONFIGS["llama-3.2-1b"], "attention_bias": True},
    "mlp bias": {**CONFIGS["llama-3.2-1b"], "mlp_bias": True},
    "qwen3 with biases": {**CONFIGS["qwen3-0.6b"], "attention_bias": True},
    "granite with biases": {**CONFIGS["granite-3.0-2b"], "attention_bias": True, "mlp_bias": True},
    "heads wider than the model": {**CONFIGS["llama-3.2-1b"], "head_dim": 128},
    "every head its own key": {**CONFIGS["llama-3.2-1b"], "num_key_value_heads": 32},
    "an output layer of its own": {**CONFIGS["qwen3-0.6b"], "tie_word_embeddings": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_follow_every_key_that_changes_them(variant: str) -> None:
    assert architecture(VARIANTS[variant]).parameters == built(VARIANTS[variant]).num_parameters()


@pytest.mark.parametrize("key", ["tie_word_embeddings", "num_key_value_heads", "head_dim"])
@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-0.6b", "granite-3.0-2b"])
def test_a_key_that_config_json_leaves_out_is_what_transformers_takes(name: str, key: str) -> None:
    config = {name: value for name, value in CONFIGS[name].items() if name != key}
    if key == "num_key_value_heads" and config["model_type"] == "qwen3":
        return  # Qwen3Config has 32 then, whatever the heads: no config.json leaves it out
    assert architecture(config).parameters == built(config).num_parameters()


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", ["o_proj", "gate_proj", "up_proj"]])
@pytest.mark.parametrize("name", CONFIGS)
def test_lora_parameters_are_pefts(name: str, targets: Any) -> None:
    config = CONFIGS[name] | {"num_hidden_layers": 2}  # PEFT wraps each layer, one as the other
    with torch.device("meta"):
        wrapped = peft.get_peft_model(
            built(config), peft.LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=targets), low_cpu_mem_usage=True
        )
    counted = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    assert architecture(config).lora_parameters(16, target_names(targets)) == counted
    assert architecture(CONFIGS[name]).lora_parameters(16, target_names(targets)) * 2 == (
        counted * CONFIGS[name]["num_hidden_layers"]
    )


@pytest.mark.parametrize("model", PUBLISHED)
def test_parameters_are_those_that_are_published(model: str) -> None:
    found = known(model)
    assert found is not None
    assert found.parameters == PUBLISHED[model]


def test_every_model_of_the_table_has_its_sizes_and_can_be_trained() -> None:
    names = table()["models"]
    assert {"meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-0.6B"} <= names.keys()
    assert set(names.values()) == CONFIGS.keys()
    for model in names:
        found = known(model)
        assert found is not None
        assert found.refusals == []
    assert known("somebody/Llama-3.1-8B") is None


def test_linear_layers_are_those_of_the_model() -> None:
    model = built(CONFIGS["qwen3-0.6b"] | {"num_hidden_layers": 1})
    found = architecture(CONFIGS["qwen3-0.6b"])
    shapes = {
        name.split(".")[-1]: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert {name: shapes[name] for name in LINEAR} == {name: found.linear(name) for name in LINEAR}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mistral"}, "none of the models"),
        ({"model_type": "granitemoe"}, "none of the models"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification is none"),
        ({"attention_bias": True, "mlp_bias": True}, "attention and mlp layers have biases"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"num_key_value_heads": 3}, "3 key-value heads do not divide 32"),
    ],
)
def test_what_neuron_does_not_train_is_said(change: dict[str, Any], said: str) -> None:
    found = architecture({**CONFIGS["llama-3.2-1b"], **change})
    assert any(said in what for what, _ in found.refusals)
    assert all(fix for _, fix in found.refusals)


def test_a_sliding_window_counts_where_it_is_used() -> None:
    with_window = CONFIGS["qwen3-0.6b"] | {"sliding_window": 4096}
    assert architecture(with_window).refusals == []
    assert architecture(with_window | {"use_sliding_window": True}).refusals


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "gpt2", "n_embd": 768},
        CONFIGS["llama-3.2-1b"] | {"hidden_size": None},
        CONFIGS["llama-3.2-1b"] | {"hidden_size": "many"},
        CONFIGS["llama-3.2-1b"] | {"num_attention_heads": 0, "head_dim": None},
        CONFIGS["llama-3.2-1b"] | {"num_hidden_layers": -1},
        CONFIGS["llama-3.2-1b"] | {"vocab_size": float("inf")},
        CONFIGS["llama-3.2-1b"] | {"architectures": 5},
    ],
)
def test_senseless_sizes_are_no_architecture(config: dict[str, Any]) -> None:
    assert from_config(config) is None


def test_the_table_is_small_and_sorted_by_nothing_but_readers() -> None:
    text = json.dumps(table())
    assert len(text) < 20_000, "check reads it at every start"
