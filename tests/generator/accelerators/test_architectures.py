"""Sizes and parameter counts of the table's models, compared with transformers and PEFT on torch's meta device."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from genvalues.accelerators.architectures import (
    LINEAR,
    MODEL_TYPES,
    ModelType,
    UnknownArchitecture,
    from_config,
    known,
    table,
    target_names,
)
from genvalues.accelerators.neuron_rules import model_problems, size_problems, supported_models
from genvalues.accelerators.xla_memory import weights
from genvalues.settings.run import TargetModule

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

CONFIGS: dict[str, dict[str, Any]] = {name: row["config"] for name, row in table().items()}
# From the models' pages on the Hub (the sum of their safetensors), or their papers.
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
    """The model without memory for its tensors."""
    kind = {**config}
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(kind.pop("model_type"), **kind)
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_equal_transformers(name: str) -> None:
    model = built(CONFIGS[name])
    assert from_config(CONFIGS[name]).parameters == model.num_parameters()


VARIANTS = {
    "attention bias": {**CONFIGS["llama-3.2-1b"], "attention_bias": True},
    "mlp bias": {**CONFIGS["llama-3.2-1b"], "mlp_bias": True},
    "qwen3 with biases": {**CONFIGS["qwen3-0.6b"], "attention_bias": True},
    "granite with biases": {**CONFIGS["granite-3.0-2b"], "attention_bias": True, "mlp_bias": True},
    "heads wider than the model": {**CONFIGS["llama-3.2-1b"], "head_dim": 128},
    "as many key heads as heads": {**CONFIGS["llama-3.2-1b"], "num_key_value_heads": 32},
    "untied output layer": {**CONFIGS["qwen3-0.6b"], "tie_word_embeddings": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_depend_on_every_key_that_changes_them(variant: str) -> None:
    assert from_config(VARIANTS[variant]).parameters == built(VARIANTS[variant]).num_parameters()


@pytest.mark.parametrize("key", ["tie_word_embeddings", "num_key_value_heads", "head_dim"])
@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-0.6b", "granite-3.0-2b"])
def test_defaults_of_missing_keys_equal_transformers(name: str, key: str) -> None:
    config = {name: value for name, value in CONFIGS[name].items() if name != key}
    if key == "num_key_value_heads" and config["model_type"] == "qwen3":
        return  # Qwen3Config then has 32, whatever the heads; every config.json has the key
    assert from_config(config).parameters == built(config).num_parameters()


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", ["o_proj", "gate_proj", "up_proj"]])
@pytest.mark.parametrize("name", CONFIGS)
def test_lora_parameters_equal_pefts(name: str, targets: Any) -> None:
    config = CONFIGS[name] | {"num_hidden_layers": 2}  # all layers are alike
    with torch.device("meta"):
        wrapped = peft.get_peft_model(
            built(config), peft.LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=targets), low_cpu_mem_usage=True
        )
    counted = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    assert from_config(config).lora_parameters(16, target_names(targets)) == counted
    assert from_config(CONFIGS[name]).lora_parameters(16, target_names(targets)) * 2 == (
        counted * CONFIGS[name]["num_hidden_layers"]
    )


@pytest.mark.parametrize("model", PUBLISHED)
def test_parameters_equal_the_published_ones(model: str) -> None:
    found = known(model)
    assert found is not None
    assert found.parameters == PUBLISHED[model]


def test_every_model_of_the_table_has_its_sizes_and_can_be_trained() -> None:
    names = [model for row in table().values() for model in row["models"]]
    assert {"meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-0.6B"} <= set(names)
    assert len(names) == len(set(names))
    for model in names:
        found = known(model)
        assert found is not None
        assert list(model_problems(found)) == []
    assert known("somebody/Llama-3.1-8B") is None


def test_linear_layers_are_those_of_the_model() -> None:
    model = built(CONFIGS["qwen3-0.6b"] | {"num_hidden_layers": 1})
    found = from_config(CONFIGS["qwen3-0.6b"])
    shapes = {
        name.split(".")[-1]: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert {name: shapes[name] for name in LINEAR} == {name: found.linear(name) for name in LINEAR}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mistral"}, "mistral is not supported"),
        ({"model_type": "granitemoe"}, "granitemoe is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification is not supported"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"num_key_value_heads": 3}, "32 is not divisible by num_key_value_heads 3"),
    ],
)
def test_a_model_that_neuron_cannot_train_is_refused(change: dict[str, Any], words: str) -> None:
    (problem,) = model_problems(from_config({**CONFIGS["llama-3.2-1b"], **change}))
    assert words in problem.what
    assert problem.fix
    assert problem.keys == (("model",),)


def test_a_sliding_window_counts_only_if_it_is_used() -> None:
    with_window = CONFIGS["qwen3-0.6b"] | {"sliding_window": 4096}
    assert list(model_problems(from_config(with_window))) == []
    assert list(model_problems(from_config(with_window | {"use_sliding_window": True})))
    with pytest.raises(UnknownArchitecture, match="has no valid sliding_window"):
        from_config(with_window | {"use_sliding_window": True, "sliding_window": "wide"})


LLAMA = CONFIGS["llama-3.2-1b"]


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({}, "num_attention_heads"),
        ({"model_type": "gpt2", "n_embd": 768}, "model_type gpt2"),
        (LLAMA | {"hidden_size": None}, "hidden_size"),
        (LLAMA | {"hidden_size": "many"}, "hidden_size"),
        (LLAMA | {"num_attention_heads": 0, "head_dim": None}, "num_attention_heads"),
        (LLAMA | {"num_hidden_layers": -1}, "num_hidden_layers"),
        (LLAMA | {"vocab_size": float("inf")}, "vocab_size"),
    ],
)
def test_a_missing_or_invalid_size_is_named(config: dict[str, Any], key: str) -> None:
    with pytest.raises(UnknownArchitecture, match=key):
        from_config(config)


def test_the_table_is_small() -> None:
    assert len(json.dumps(table())) < 20_000, "check reads it at every start"


def test_a_new_model_type_needs_one_entry_and_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules, messages and memory follow from its entry."""
    config = LLAMA | {"model_type": "made_up", "architectures": ["MadeUpForCausalLM"], "vocab_size": 1001}
    del config["head_dim"]
    assert "not supported" in next(model_problems(from_config(config))).what
    entry = ModelType("MadeUpForCausalLM", "Made Up 1", default_head=96, splits_vocabulary=False)
    monkeypatch.setitem(MODEL_TYPES, "made_up", entry)
    found = from_config(config)
    assert list(model_problems(found)) == list(size_problems(found, 8, "trn1")) == []
    assert found.head == 96
    assert weights(found, 8) > 1001 * found.hidden
    monkeypatch.setitem(MODEL_TYPES, "made_up", entry._replace(splits_vocabulary=True))
    assert "vocabulary size 1001" in next(size_problems(found, 8, "trn1")).what
    assert "MadeUpForCausalLM (Made Up 1)" in supported_models()


def test_the_inputs_accept_exactly_the_linear_layers_as_lora_targets() -> None:
    assert get_args(TargetModule) == tuple(LINEAR)
