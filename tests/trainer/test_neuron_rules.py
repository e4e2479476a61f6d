"""The rules, compared with the answers of the real optimum-neuron 0.4.5 (recorded by fixtures/neuron/refusals.py)."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from genvalues.accelerators.architectures import LINEAR, target_names
from llama_lora.backends.xla import rules
from llama_lora.config import RunConfig

CASES = json.loads((Path(__file__).parent / "fixtures" / "neuron" / "refusals.json").read_text())

# The sizes of each model's config.json on the Hub.
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "attention_bias": False,
    "mlp_bias": False,
}
LLAMA_3B = {**LLAMA_8B, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24}
LLAMA_70B = {**LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "attention_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
}
GRANITE_8B = {
    "architectures": ["GraniteForCausalLM"],
    "model_type": "granite",
    "hidden_size": 4096,
    "intermediate_size": 12800,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 49155,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}

# One trn1.32xlarge, TP 8 x DP 4.
RUN: dict[str, Any] = {
    "name": "run",
    "backend": "neuron",
    "model": {"id": "meta-llama/Llama-3.1-8B"},
    "dataset": {"source": "rows", "format": "instruction", "columns": {}, "evalFraction": 0.1},
    "lora": {"r": 16, "alpha": 16, "dropout": 0.05, "targetModules": ["q_proj", "v_proj"]},
    "training": {
        "maxSequenceLength": 2048,
        "packing": True,
        "perDeviceBatchSize": 1,
        "gradientAccumulationSteps": 3,
        "epochs": 1,
        "learningRate": 1e-4,
        "lrScheduler": "linear",
        "warmupRatio": 0.1,
        "weightDecay": 0.0,
        "maxGradNorm": 1.0,
        "saveSteps": 100,
        "saveTotalLimit": 2,
        "seed": 42,
    },
    "evaluation": {"maxRows": 8, "samples": 2, "maxNewTokens": 8},
    "parallelism": {"nodes": 1, "processesPerNode": 32, "tensorParallelSize": 8, "dataParallelSize": 4},
}


def run_config(**changes: dict[str, Any]) -> RunConfig:
    """RUN, with keys of sections changed."""
    config = copy.deepcopy(RUN)
    for section, values in changes.items():
        config[section] = {**config[section], **values}
    return RunConfig.model_validate(config)


def parallelism(tensor: int, data: int, nodes: int = 1) -> dict[str, int]:
    return {
        "nodes": nodes,
        "processesPerNode": tensor * data // nodes,
        "tensorParallelSize": tensor,
        "dataParallelSize": data,
    }


def errors(config: RunConfig, model: dict[str, Any], platform: str | None = None) -> list[str]:
    return [str(error) for error in rules.check(config, model, platform)]


def config_of_case(case: dict[str, Any]) -> RunConfig:
    return run_config(
        lora={"targetModules": case["targets"]},
        training={"maxSequenceLength": case["length"], "attention": case["attention"]},
        parallelism=parallelism(case["tp"], 1),
    )


def named(case: dict[str, Any]) -> str:
    return f"{case['model']['model_type']} {case['what']}"


# --- compared with the library

# Accepted or worded differently by the library; see the tests below.
OURS = ("biases", "all-linear as a word", "embeddings")


@pytest.mark.parametrize("case", [case for case in CASES if case["what"] not in OURS], ids=named)
def test_the_rules_refuse_exactly_what_the_library_refuses(case: dict[str, Any]) -> None:
    try:
        found = errors(config_of_case(case), case["model"])
    except ValidationError as error:  # an unknown layer
        found = [str(error)]
    assert bool(found) == bool(case["refused"]), (found, case["refused"])


def test_the_recorded_answers_cover_every_model_type() -> None:
    outcomes = {(case["model"]["model_type"], case["tp"] > 1, bool(case["refused"])) for case in CASES}
    assert {(model, True, refused) for model in ("llama", "qwen3", "granite") for refused in (True, False)} <= outcomes


def test_biases_that_the_library_would_silently_ignore_are_refused() -> None:
    (case,) = (case for case in CASES if case["what"] == "biases")
    assert case["refused"] is None
    assert [
        key for key in ("attention_bias", "mlp_bias") if key in str(errors(config_of_case(case), case["model"]))
    ] == [
        "attention_bias",
        "mlp_bias",
    ]


def test_all_linear_is_spelled_out_because_the_library_fails_on_the_word() -> None:
    (case,) = (case for case in CASES if case["what"] == "all-linear as a word")
    assert case["refused"].startswith("AttributeError")
    assert not errors(config_of_case(case), case["model"])
    spelled = target_names("all-linear")
    (taken,) = (c for c in CASES if named(c) == "llama all linear layers")
    assert sorted(spelled) == sorted(taken["targets"]) and taken["refused"] is None
    assert target_names(["q_proj"]) == ["q_proj"]


def test_embeddings_are_refused_because_merge_supports_only_linear_layers() -> None:
    (case,) = (case for case in CASES if case["what"] == "embeddings")
    assert case["refused"] is None
    with pytest.raises(ValidationError, match=r"lora\.targetModules") as refused:
        config_of_case(case)
    assert "all-linear" in str(refused.value) and all(name in str(refused.value) for name in LINEAR)


# --- messages


@pytest.mark.parametrize("model", [LLAMA_8B, LLAMA_3B, LLAMA_70B, QWEN3_8B, GRANITE_8B])
@pytest.mark.parametrize("attention", ["eager", "flash"])
def test_the_default_run_is_allowed_for_every_model(model: dict[str, Any], attention: str) -> None:
    assert errors(run_config(training={"attention": attention}), model, "trn1") == []
    assert errors(run_config(lora={"targetModules": "all-linear"}), model, "trn2") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
            "model: MistralForCausalLM is not supported by optimum-neuron 0.4.5. Use one of LlamaForCausalLM (Llama 3, "
            "3.1, 3.2 and 3.3), Qwen3ForCausalLM (Qwen3), GraniteForCausalLM (Granite 3).",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "model: LlamaForSequenceClassification is not support"),
        ({"model_type": "granitemoe", "architectures": None}, "model: model type granitemoe is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantized weights. Use the model's bf16 weights."),
        ({"num_key_value_heads": 5}, "num_attention_heads 32 is not divisible by num_key_value_heads 5"),
        ({"hidden_size": 4100}, "hidden_size 4100 is not divisible by num_attention_heads 32"),
    ],
)
def test_other_models_are_refused_with_the_supported_ones(changes: dict[str, Any], message: str) -> None:
    (error,) = errors(run_config(), {**LLAMA_8B, **changes})
    assert message in error


def test_a_sliding_window_is_refused_with_its_size() -> None:
    (error,) = errors(run_config(), {**QWEN3_8B, "use_sliding_window": True, "sliding_window": 4096})
    assert "sliding_window is 4096" in error and "Set use_sliding_window to false" in error


@pytest.mark.parametrize(
    ("model", "layout", "message"),
    [
        (LLAMA_3B, parallelism(16, 2), "24 attention heads are not divisible by 16. Use 1, 2, 4 or 8."),
        (
            LLAMA_8B,
            parallelism(64, 1, 2),
            "32 attention heads are not divisible by 64. Use 1, 2, 4, 8, 16 or 32.",
        ),
        (QWEN3_8B, parallelism(6, 1), "8 key-value heads. Use 1 or 2."),
        (
            {**LLAMA_8B, "intermediate_size": 14340},
            parallelism(8, 4),
            "intermediate size 14340 is not divisible by 8. Use 1, 2 or 4.",
        ),
        (
            {**LLAMA_8B, "vocab_size": 128258},
            parallelism(8, 4),
            "vocabulary size 128258 is not divisible by 8. Use 1 or 2.",
        ),
    ],
)
def test_a_tensor_parallel_size_is_refused_with_those_that_work(
    model: dict[str, Any], layout: dict[str, int], message: str
) -> None:
    config = run_config(parallelism=layout, lora={"targetModules": "all-linear"}, training={"maxSequenceLength": 1920})
    found = [error for error in errors(config, model) if error.startswith("parallelism.tensorParallelSize: ")]
    assert any(error.endswith(message) for error in found), found


def test_suggested_sizes_are_allowed() -> None:
    for model in (LLAMA_8B, LLAMA_3B, LLAMA_70B, QWEN3_8B, GRANITE_8B):
        for processes in (2, 8, 32, 64, 96):
            wrong = run_config(parallelism=parallelism(processes, 1))
            sizes = rules.architecture_of(model)
            fitting = rules.tensor_parallel_sizes(wrong, sizes, "trn2")
            assert fitting and fitting[0] == 1
            for size in fitting:
                right = run_config(
                    parallelism=parallelism(size, processes // size),
                    lora={"targetModules": "all-linear"},
                    training={"maxSequenceLength": math.lcm(2048, size)},
                )
                assert errors(right, model, "trn2") == []


def test_more_workers_than_kv_heads_need_lora_on_q_k_and_v_together() -> None:
    config = run_config(parallelism=parallelism(16, 2))
    (error,) = errors(config, LLAMA_8B)
    assert error.startswith("lora.targetModules: with tensorParallelSize 16 the 8 key-value heads are replicated")
    assert error.endswith("(missing: k_proj). Add k_proj, or set tensorParallelSize to 1, 2, 4 or 8.")
    for targets in (["q_proj", "k_proj", "v_proj"], ["o_proj"], "all-linear"):
        assert (
            errors(run_config(parallelism=parallelism(16, 2), lora={"targetModules": targets}), LLAMA_8B, "trn1") == []
        )


def test_a_node_with_more_processes_than_trn1_cores_is_a_trn2() -> None:
    config = run_config(parallelism=parallelism(16, 4), lora={"targetModules": "all-linear"})
    assert "wrong gradients" in str(errors(config, LLAMA_8B))
    two_trn1 = run_config(parallelism=parallelism(16, 4, nodes=2), lora={"targetModules": "all-linear"})
    assert errors(two_trn1, LLAMA_8B) == []


def test_more_workers_than_kv_heads_are_refused_on_trn2_for_all_targets() -> None:
    """Gradients through k and v belong to other heads there; genvalues.accelerators.neuron_rules has the numbers."""
    for targets in ("all-linear", ["down_proj"]):
        config = run_config(parallelism=parallelism(16, 4), lora={"targetModules": targets})
        (error,) = errors(config, LLAMA_8B, "trn2")
        assert error.startswith("parallelism.tensorParallelSize: 16 is more than the model's 8 key-value heads")
        assert "wrong gradients" in error and error.endswith("Use 1, 2, 4 or 8.")
        assert errors(config, {**LLAMA_8B, "num_key_value_heads": 1}, "trn2") == []
        assert errors(config, LLAMA_8B, "trn1") == []


@pytest.mark.parametrize(
    ("training", "model", "key", "words", "fix"),
    [
        (
            {"maxSequenceLength": 2050},
            {},
            "training.maxSequenceLength",
            "2050 tokens are not divisible by tensorParallelSize 8",
            "Use 2048 or 2056.",
        ),
        (
            {"maxSequenceLength": 3000, "attention": "flash"},
            {},
            "training.attention",
            "multiple of 2048, not 3000",
            "Set maxSequenceLength to 2048 or 4096, or set attention to isolated.",
        ),
        (
            {"maxSequenceLength": 1024, "attention": "flash"},
            {"max_position_embeddings": 1024},
            "training.attention",
            "multiple of 2048, not 1024",
            "Set attention to isolated.",
        ),
        (
            {"maxSequenceLength": 4096},
            {"max_position_embeddings": 2048},
            "training.maxSequenceLength",
            "4096 is more than the 2048 positions",
            "Use 2048 or less.",
        ),
        ({"attention": "flash"}, {"head_dim": 256}, "training.attention", "up to 128 features", "Use isolated."),
    ],
)
def test_a_row_length_is_refused_with_those_that_work(
    training: dict[str, Any], model: dict[str, Any], key: str, words: str, fix: str
) -> None:
    (error,) = errors(run_config(training=training), {**LLAMA_8B, **model})
    assert error.startswith(f"{key}: ") and words in error and error.endswith(fix)


def test_gate_and_up_need_lora_together() -> None:
    (error,) = errors(run_config(lora={"targetModules": ["up_proj", "down_proj"]}), LLAMA_8B)
    assert error.startswith("lora.targetModules: up_proj without gate_proj")
    assert error.endswith("Add gate_proj or remove up_proj.")


def test_the_processes_are_those_of_the_groups() -> None:
    (error,) = errors(run_config(parallelism={"dataParallelSize": 2}), LLAMA_8B)
    assert error.startswith("parallelism.dataParallelSize: nodes 1 x processesPerNode 32 = 32 is not ")
    assert error.endswith("Set dataParallelSize to 4.")
    (error,) = errors(run_config(parallelism={"processesPerNode": 12}), LLAMA_8B)
    assert error.startswith("parallelism.") and error.endswith("Set tensorParallelSize to a divisor of the processes.")


def test_base_weights_are_not_shared() -> None:
    (error,) = errors(run_config(parallelism={"shardSize": 2}), LLAMA_8B)
    assert error.startswith("parallelism.shardSize: requires backend native")


def test_every_mistake_is_reported_at_once() -> None:
    config = run_config(
        lora={"targetModules": ["gate_proj"]},
        training={"maxSequenceLength": 1001},
        parallelism={"tensorParallelSize": 6},
    )
    found = rules.check(config, LLAMA_8B)
    assert {error.where for error in found} == {
        "lora.targetModules",
        "training.maxSequenceLength",
        "parallelism.tensorParallelSize",
        "parallelism.nodes",
    }


def test_a_config_without_a_size_is_refused_by_its_name() -> None:
    model = {key: value for key, value in LLAMA_8B.items() if key != "intermediate_size"}
    (error,) = errors(run_config(), model)
    assert error.startswith("model: ") and "no valid intermediate_size" in error


def test_packed_examples_with_flash_are_a_warning_unless_they_are_text() -> None:
    flash = {"attention": "flash"}
    (warning,) = rules.warnings(run_config(training=flash))
    assert warning.startswith("training.attention: ") and "attention: isolated or packing: false" in warning
    assert rules.warnings(run_config()) == []
    assert rules.warnings(run_config(training={**flash, "packing": False})) == []
    assert rules.warnings(run_config(training=flash, dataset={"format": "text"})) == []


def test_groups_that_span_two_nodes_are_a_warning() -> None:
    (warning,) = rules.warnings(run_config(parallelism=parallelism(64, 1, nodes=2)))
    assert warning.startswith("parallelism.tensorParallelSize: the 32 processes of a node are not divisible by 64")
