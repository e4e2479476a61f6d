"""The rules against what the real optimum-neuron 0.4.5 does (fixtures/neuron/refusals.py asked it), and their words."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from llama_lora.backends.neuron import rules
from llama_lora.config import RunConfig

CASES = json.loads((Path(__file__).parent / "fixtures" / "neuron" / "refusals.json").read_text())

# The sizes of the models' own config.json on the hub.
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

# The seed's run: one trn1.32xlarge, TP 8 x DP 4.
SEED: dict[str, Any] = {
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
    """The seed's, with keys of sections changed."""
    config = copy.deepcopy(SEED)
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


def said(config: RunConfig, model: dict[str, Any], platform: rules.Platform | None = None) -> list[str]:
    return [str(error) for error in rules.check(config, model, platform)]


def config_of_case(case: dict[str, Any]) -> RunConfig:
    return run_config(
        lora={"targetModules": case["targets"]},
        training={"maxSequenceLength": case["length"], "attention": case["attention"]},
        parallelism=parallelism(case["tp"], 1),
    )


def named(case: dict[str, Any]) -> str:
    return f"{case['model']['model_type']} {case['what']}"


# Against the library.

OURS = ("biases", "all-linear as a word", "embeddings")


@pytest.mark.parametrize("case", [case for case in CASES if case["what"] not in OURS], ids=named)
def test_what_the_library_refuses_is_refused_and_what_it_takes_is_taken(case: dict[str, Any]) -> None:
    errors = said(config_of_case(case), case["model"])
    assert bool(errors) == bool(case["refused"]), (errors, case["refused"])


def test_the_library_was_asked_for_every_kind_of_answer() -> None:
    outcomes = {(case["model"]["model_type"], case["tp"] > 1, bool(case["refused"])) for case in CASES}
    assert {(model, True, refused) for model in ("llama", "qwen3", "granite") for refused in (True, False)} <= outcomes


def test_biases_that_the_library_would_leave_out_in_silence_are_refused() -> None:
    (case,) = (case for case in CASES if case["what"] == "biases")
    assert case["refused"] is None
    assert [key for key in ("attention_bias", "mlp_bias") if key in str(said(config_of_case(case), case["model"]))] == [
        "attention_bias",
        "mlp_bias",
    ]


def test_all_linear_is_spelled_out_for_the_library_which_does_not_know_the_word() -> None:
    (case,) = (case for case in CASES if case["what"] == "all-linear as a word")
    assert case["refused"].startswith("AttributeError")
    assert not said(config_of_case(case), case["model"])
    spelled = rules.target_modules("all-linear")
    (taken,) = (c for c in CASES if named(c) == "llama all linear layers")
    assert sorted(spelled) == sorted(taken["targets"]) and taken["refused"] is None
    assert rules.target_modules(["q_proj"]) == ["q_proj"]


def test_embeddings_are_refused_because_merging_knows_linear_layers_alone() -> None:
    (case,) = (case for case in CASES if case["what"] == "embeddings")
    assert case["refused"] is None
    assert said(config_of_case(case), case["model"]) == [
        "lora.targetModules: embed_tokens, lm_head: LoRA cannot be put there. "
        "Use all-linear, or some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."
    ]


# The words.


@pytest.mark.parametrize("model", [LLAMA_8B, LLAMA_3B, LLAMA_70B, QWEN3_8B, GRANITE_8B])
@pytest.mark.parametrize("attention", ["eager", "flash"])
def test_the_seeds_run_is_allowed_for_every_model(model: dict[str, Any], attention: str) -> None:
    assert said(run_config(training={"attention": attention}), model, "trn1") == []
    assert said(run_config(lora={"targetModules": "all-linear"}), model, "trn2") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
            "model: MistralForCausalLM is none of the models that optimum-neuron 0.4.5 trains with tensor parallelism. "
            "Use one of LlamaForCausalLM, Qwen3ForCausalLM, GraniteForCausalLM (Llama 3, 3.1, 3.2, 3.3; Qwen3; "
            "Granite).",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "model: LlamaForSequenceClassification is none of"),
        ({"model_type": "granitemoe", "architectures": None}, "model: model_type 'granitemoe' is none of"),
        (
            {"quantization_config": {"bits": 4}},
            "the model's config.json: the weights are quantized, which optimum-neuron does not read for training. "
            "Use the model's bf16 weights.",
        ),
        ({"num_key_value_heads": 5}, "num_attention_heads 32 is not divisible by num_key_value_heads 5"),
        ({"hidden_size": 4100}, "hidden_size 4100 is not divisible by num_attention_heads 32"),
    ],
)
def test_other_models_are_refused_with_the_list(changes: dict[str, Any], message: str) -> None:
    (error,) = said(run_config(), {**LLAMA_8B, **changes})
    assert message in error


def test_a_sliding_window_is_refused_with_its_size() -> None:
    (error,) = said(run_config(), {**QWEN3_8B, "use_sliding_window": True, "sliding_window": 4096})
    assert "sliding_window is 4096" in error and "Set use_sliding_window to false" in error


@pytest.mark.parametrize(
    ("model", "layout", "message"),
    [
        (LLAMA_3B, parallelism(16, 2), "16 does not divide the model's 24 attention heads. Use 1, 2, 4 or 8."),
        (
            LLAMA_8B,
            parallelism(64, 1, 2),
            "64 does not divide the model's 32 attention heads. Use 1, 2, 4, 8, 16 or 32.",
        ),
        (QWEN3_8B, parallelism(6, 1), "6 and the model's 8 key-value heads: neither divides the other. Use 1 or 2."),
        (
            {**LLAMA_8B, "intermediate_size": 14340},
            parallelism(8, 4),
            "8 does not divide the model's intermediate_size 14340. Use 1, 2 or 4.",
        ),
        (
            {**LLAMA_8B, "vocab_size": 128258},
            parallelism(8, 4),
            "8 does not divide the model's vocabulary of 128258. Use 1 or 2.",
        ),
    ],
)
def test_a_tensor_parallel_size_is_refused_with_those_that_fit(
    model: dict[str, Any], layout: dict[str, int], message: str
) -> None:
    config = run_config(parallelism=layout, lora={"targetModules": "all-linear"}, training={"maxSequenceLength": 1920})
    assert f"parallelism.tensorParallelSize: {message}" in said(config, model)


def test_what_is_advised_is_allowed() -> None:
    """Every size named in a fix has no complaint about tensor parallelism."""
    for model in (LLAMA_8B, LLAMA_3B, LLAMA_70B, QWEN3_8B, GRANITE_8B):
        for processes in (2, 8, 32, 64, 96):
            wrong = run_config(parallelism=parallelism(processes, 1))
            sizes = rules.sizes_of(model)
            fitting = rules.tensor_parallel_sizes(wrong, sizes, "trn2")
            assert fitting and fitting[0] == 1
            for size in fitting:
                right = run_config(
                    parallelism=parallelism(size, processes // size),
                    lora={"targetModules": "all-linear"},
                    training={"maxSequenceLength": math.lcm(2048, size)},
                )
                assert said(right, model, "trn2") == []


def test_more_workers_than_kv_heads_want_q_k_and_v_together() -> None:
    config = run_config(parallelism=parallelism(16, 2))
    assert said(config, LLAMA_8B) == [
        "lora.targetModules: k_proj missing: with tensorParallelSize 16 and 8 key-value heads, q_proj, k_proj and "
        "v_proj are one layer on Neuron, and get LoRA together or not. "
        "Add k_proj, or use tensorParallelSize 1, 2, 4 or 8."
    ]
    for targets in (["q_proj", "k_proj", "v_proj"], ["o_proj"], "all-linear"):
        assert said(run_config(parallelism=parallelism(16, 2), lora={"targetModules": targets}), LLAMA_8B, "trn1") == []


def test_a_node_of_more_processes_than_a_trn1_has_cores_is_a_trn2() -> None:
    config = run_config(parallelism=parallelism(16, 4), lora={"targetModules": "all-linear"})
    assert "wrong gradients on Trn2" in str(said(config, LLAMA_8B))
    two_trn1 = run_config(parallelism=parallelism(16, 4, nodes=2), lora={"targetModules": "all-linear"})
    assert said(two_trn1, LLAMA_8B) == []


def test_more_workers_than_kv_heads_are_refused_on_trn2_whatever_is_trained() -> None:
    """Gradients that go back through k and v are of other heads there; see rules.py for the numbers."""
    for targets in ("all-linear", ["down_proj"]):
        config = run_config(parallelism=parallelism(16, 4), lora={"targetModules": targets})
        assert said(config, LLAMA_8B, "trn2") == [
            "parallelism.tensorParallelSize: 16 is more than the model's 8 key-value heads, for which optimum-neuron "
            "0.4.5 adds up the wrong gradients on Trn2. Use 1, 2, 4 or 8."
        ]
        assert said(config, {**LLAMA_8B, "num_key_value_heads": 1}, "trn2") == []
        assert said(config, LLAMA_8B, "trn1") == []


@pytest.mark.parametrize(
    ("training", "model", "message"),
    [
        (
            {"maxSequenceLength": 2050},
            {},
            "training.maxSequenceLength: 2050 is not divisible by tensorParallelSize 8: sequence parallelism cuts each "
            "row. Use 2048 or 2056.",
        ),
        (
            {"maxSequenceLength": 3000, "attention": "flash"},
            {},
            "training.maxSequenceLength: 3000 is no multiple of 2048, as attention flash needs. Use 2048 or 4096, "
            "or training.attention: eager.",
        ),
        (
            {"maxSequenceLength": 1024, "attention": "flash"},
            {"max_position_embeddings": 1024},
            "training.maxSequenceLength: 1024 is no multiple of 2048, as attention flash needs. "
            "Write training.attention: eager.",
        ),
        (
            {"maxSequenceLength": 4096},
            {"max_position_embeddings": 2048},
            "training.maxSequenceLength: 4096 is more than the 2048 positions the model knows. Set it to 2048 or less.",
        ),
        (
            {"attention": "flash"},
            {"head_dim": 256},
            "training.attention: flash takes heads of up to 128, the model's have 256. Write eager.",
        ),
    ],
)
def test_a_row_length_is_refused_with_those_that_fit(
    training: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    assert said(run_config(training=training), {**LLAMA_8B, **model}) == [message]


def test_gate_and_up_go_together() -> None:
    (error,) = said(run_config(lora={"targetModules": ["up_proj", "down_proj"]}), LLAMA_8B)
    assert error == (
        "lora.targetModules: gate_proj is missing: gate_proj and up_proj are one layer on Neuron, and get LoRA "
        "together or not. Add gate_proj, or leave both out."
    )


def test_the_processes_are_those_of_the_groups() -> None:
    (error,) = said(run_config(parallelism={"dataParallelSize": 2}), LLAMA_8B)
    assert error == "parallelism.dataParallelSize: 1 x 32 = 32 processes are not 8 x 2. Set it to 4."
    (error,) = said(run_config(parallelism={"processesPerNode": 12}), LLAMA_8B)
    assert error.startswith("parallelism: 1 x 12 = 12 processes are not 8 x 4, and 8 does not divide them.")


def test_every_mistake_is_told_at_once() -> None:
    config = run_config(
        lora={"targetModules": ["gate_proj", "c_attn"]},
        training={"maxSequenceLength": 1001},
        parallelism={"tensorParallelSize": 6},
    )
    where = {error.where for error in rules.check(config, LLAMA_8B)}
    assert where == {
        "lora.targetModules",
        "training.maxSequenceLength",
        "parallelism.tensorParallelSize",
        "parallelism",
    }


def test_a_config_without_a_size_is_refused_by_its_name() -> None:
    model = {key: value for key, value in LLAMA_8B.items() if key != "intermediate_size"}
    with pytest.raises(rules.UserError, match="has no 'intermediate_size'"):
        rules.check(run_config(), model)


def test_packed_examples_under_flash_are_doubtful_unless_they_are_text() -> None:
    flash = {"attention": "flash"}
    (doubt,) = rules.warnings(run_config(training=flash))
    assert "see those before them" in doubt and "Write eager, or packing: false" in doubt
    assert rules.warnings(run_config()) == []
    assert rules.warnings(run_config(training={**flash, "packing": False})) == []
    assert rules.warnings(run_config(training=flash, dataset={"format": "text"})) == []


def test_groups_over_two_nodes_are_doubtful() -> None:
    (doubt,) = rules.warnings(run_config(parallelism=parallelism(64, 1, nodes=2)))
    assert doubt.startswith("parallelism.tensorParallelSize 64 does not divide the 32 processes of a node")
