"""Which models, layouts and row lengths backend native trains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from genvalues.accelerators.architectures import known
from genvalues.accelerators.native_rules import length_problems, model_problems, possible_sizes, size_problems
from genvalues.common.problems import Problem

FOUND = known("meta-llama/Llama-3.1-8B")
assert FOUND is not None
LLAMA_8B = FOUND  # 32 heads, 8 key-value heads, intermediate size 14336


def told(problems: Iterable[Problem]) -> str:
    return "\n".join(f"{'.'.join(map(str, each.keys[0]))}: {each.what}. {each.fix}" for each in problems)


@pytest.mark.parametrize("change", [{}, {"attention_bias": True, "mlp_bias": True}, {"vocabulary": 128255}])
def test_biases_and_any_vocabulary_are_fine(change: dict[str, object]) -> None:
    assert not list(model_problems(replace(LLAMA_8B, **change)))  # type: ignore[arg-type]
    assert not list(size_problems(replace(LLAMA_8B, **change), 8))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba", "model_class": ""}, "model type mamba is not supported"),
        ({"quantized": True}, "quantized"),
        ({"kv_heads": 3}, "32 is not divisible by num_key_value_heads 3"),
    ],
)
def test_models_that_it_cannot_train(change: dict[str, object], words: str) -> None:
    found = told(model_problems(replace(LLAMA_8B, **change)))  # type: ignore[arg-type]
    assert found.startswith("model: ") and words in found


@pytest.mark.parametrize(
    ("size", "words"), [(8, ""), (16, "8 key-value heads"), (5, "32 attention heads"), (64, "64"), (1, "")]
)
def test_tensor_parallelism_divides_heads_and_mlp(size: int, words: str) -> None:
    found = told(size_problems(LLAMA_8B, size, (1, 2, 4, 8, 16, 64)))
    if words:
        assert found.startswith("parallelism.tensorParallelSize: ") and words in found and "Use 1, 2, 4 or 8." in found
    else:
        assert found == ""
    assert possible_sizes(LLAMA_8B, (1, 2, 4, 8, 16, 64)) == [1, 2, 4, 8]
    assert possible_sizes(replace(LLAMA_8B, intermediate=14338), (1, 2, 4)) == [1, 2]


@pytest.mark.parametrize(
    ("length", "attention", "device", "words"),
    [
        (2048, "causal", "neuron", ""),
        (1000, "isolated", "cpu", ""),
        (1000, "causal", "cuda", ""),
        (1000, "isolated", "neuron", "multiple of 512 on Trainium, not 1000. Use 512 or 1024."),
        (100, "causal", "neuron", "Use 512."),
        (131584, "causal", "neuron", "131072 positions of the model. Use 131072 or less."),
    ],
)
def test_rows_on_trainium_are_a_multiple_of_512(length: int, attention: str, device: str, words: str) -> None:
    found = told(length_problems(length, attention, device, LLAMA_8B))
    assert found.startswith("training.maxSequenceLength: ") and words in found if words else found == ""


def test_the_flash_kernel_limits_heads_on_trainium_only() -> None:
    wide = replace(LLAMA_8B, head=256)
    assert told(length_problems(2048, "causal", "neuron", wide)).startswith("training.attention: ")
    assert not list(length_problems(2048, "isolated", "neuron", wide))
    assert not list(length_problems(2048, "causal", "cpu", wide))


@pytest.mark.parametrize("device", ["cpu", "neuron", "cuda"])
def test_flash_attention_with_a_mask_is_one_of_backend_xla(device: str) -> None:
    found = told(length_problems(2048, "isolatedFlash", device, LLAMA_8B))
    assert found == "training.attention: isolatedFlash requires backend xla. Use isolated."


@pytest.mark.parametrize("attention", ["isolated", "causal"])
def test_no_attention_has_a_sliding_window_so_rows_are_not_longer_than_it(attention: str) -> None:
    model = replace(LLAMA_8B, sliding_window=1200)
    found = told(length_problems(1201, attention, "cpu", model))
    assert found.startswith("training.maxSequenceLength: ") and found.endswith("Use 1200 or less.")
    assert not list(length_problems(1200, attention, "cpu", model))
    assert "Use 1024 or less." in told(length_problems(2048, attention, "neuron", model))
    assert "without a sliding window" in told(
        length_problems(512, attention, "neuron", replace(model, sliding_window=8))
    )
