"""The rehearsal runs every step on a small model, finds planted mistakes, and leaves nothing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genvalues.accelerators import architectures
from genvalues.common.errors import UserError
from llama_lora import layout_trace, small_run
from llama_lora.adapter import Delta
from llama_lora.config import Parallelism
from llama_lora.data.row_checks import answer_ends, stop_tokens, trained_window
from llama_lora.data.tokens import IGNORED
from trainer.conftest import (
    CHAT_TEMPLATE,
    LLAMA_LORA,
    TWO_PROCESSES,
    Run,
    byte_tokenizer,
    llama_lora,
    make_model,
    make_run,
)
from trainer.warm import WarmPopen

pytestmark = pytest.mark.long

GIB = 2**30
ON_TRAINIUM = {"maxSequenceLength": 512, "packing": True}


@pytest.fixture
def native_run(new_run: Callable[..., Run]) -> Callable[..., Run]:
    def make(**changes: Any) -> Run:
        run = new_run(**changes)
        run.config["backend"] = "native"
        return run

    return make


def stand_in_tracer(monkeypatch: pytest.MonkeyPatch, peak: float = GIB, problems: tuple[str, ...] = ()) -> None:
    """The stages are forks of this process, so they run this tracer too."""
    summary = {
        "world": 4,
        "bytes": {"base": 1, "peak": peak},
        "operators": ["aten.mm"],
        "graphs": 3,
        "seconds": 1.0,
        "problems": list(problems),
    }
    script = f"import sys; print('tracing'); print({json.dumps(summary)!r}, flush=True); print('late', file=sys.stderr)"
    monkeypatch.setattr(layout_trace, "tracer_command", lambda config, model: [sys.executable, "-c", script])


def test_every_step_is_rehearsed_and_nothing_is_left(native_run: Callable[..., Run]) -> None:
    run = native_run()
    run("tokenize")
    said = run("rehearse")
    for words in ("2 workers", "resuming from", "step-000002", "wrote 8 tensors", "merged 4 of", "rehearse: generate"):
        assert words in said
    assert said.count("probe: the loss of 2 rows") == 2  # consolidate and merge verify their weights
    assert sorted(path.name for path in run.paths.run.iterdir()) == [
        *("metrics.prom", "resolved.json", "run.yaml", "stages"),
    ]
    facts = run.manifest("rehearse")["facts"]
    assert len(facts["losses"]) == small_run.STEPS and facts["losses"][-1] < facts["losses"][0]
    assert "trace" not in facts, "the CPU needs none"
    assert "nothing changed" in run("rehearse")
    run.config["training"]["learningRate"] = 2e-2
    assert "resuming from" in run("rehearse")


@pytest.mark.skipif(
    int(importlib.metadata.version("torch").split(".")[1]) < 13,
    reason="backend native needs PyTorch 2.13: parallelize_module of 2.8 has base weights require gradients again",
)
def test_on_trainium_the_real_layout_is_traced(native_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_tracer(monkeypatch)
    run = native_run(
        training=ON_TRAINIUM, parallelism={"tensorParallelSize": 2, "dataParallelSize": 2, "processesPerNode": 4}
    )
    run.config["device"] = "neuron"
    run("tokenize")
    said = run("rehearse")
    assert "2 workers" in said and "traced 4 workers" in said
    assert run.manifest("rehearse")["facts"]["trace"]["bytes"]["peak"] == GIB


# --- planted mistakes: the stage that finds it, what plants it, the place and the words of the message


def wrong_target(run: Run, patch: pytest.MonkeyPatch) -> None:
    run.config["lora"]["targetModules"] = ["query"]


def answers_without_end(run: Run, patch: pytest.MonkeyPatch) -> None:
    own_model(run)
    byte_tokenizer(CHAT_TEMPLATE.replace("<|end|>", "<|start|>")).save_pretrained(run.config["model"]["path"])


def small_vocabulary(run: Run, patch: pytest.MonkeyPatch) -> None:
    own_model(run, vocab_size=200, eos_token_id=1, bos_token_id=0)


def rows_beyond_the_positions(run: Run, patch: pytest.MonkeyPatch) -> None:
    run.config["training"]["maxSequenceLength"] = 1024


def indivisible_heads(run: Run, patch: pytest.MonkeyPatch) -> None:
    run.config["parallelism"] |= {"tensorParallelSize": 4, "processesPerNode": 4}


def too_few_processes(run: Run, patch: pytest.MonkeyPatch) -> None:
    run.config["parallelism"] |= {"dataParallelSize": 4}


def indivisible_copies(run: Run, patch: pytest.MonkeyPatch) -> None:
    run.config["parallelism"] |= {"dataParallelSize": 2, "processesPerNode": 2, "shardSize": 4}


def nothing_to_train_on(run: Run, patch: pytest.MonkeyPatch) -> None:
    run.config["training"]["maxSequenceLength"] = 16


def overflow(run: Run, patch: pytest.MonkeyPatch) -> None:
    own_model(run, dtype="float16")
    run.config["lora"] |= {"r": 1, "alpha": 65536}
    run.config["training"] |= {"learningRate": 1.0, "lrScheduler": "constant"}


def odd_length_on_trainium(run: Run, patch: pytest.MonkeyPatch) -> None:
    run.config["device"] = "neuron"


def quantized(run: Run, patch: pytest.MonkeyPatch) -> None:
    change_config(own_model(run), quantization_config={"quant_method": "gptq", "bits": 4})


def sliding_window(run: Run, patch: pytest.MonkeyPatch) -> None:
    change_config(own_model(run), model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=64)


def out_of_memory(run: Run, patch: pytest.MonkeyPatch) -> None:
    run.config["device"] = "neuron"
    run.config["training"] |= ON_TRAINIUM
    stand_in_tracer(patch, peak=30 * GIB)


def data_dependent_shape(run: Run, patch: pytest.MonkeyPatch) -> None:
    run.config["device"] = "neuron"
    run.config["training"] |= ON_TRAINIUM
    stand_in_tracer(patch, problems=("aten.nonzero has a data-dependent shape",))


def unwritable_volume(run: Run, patch: pytest.MonkeyPatch) -> None:
    run.paths.small_run.parent.mkdir(parents=True)
    run.paths.small_run.touch()  # a mode would not stop root


def own_model(run: Run, **settings: Any) -> Path:
    model = make_model(run.folder / "model", **settings)
    run.config["model"]["path"] = str(model)
    return model


def change_config(model: Path, **keys: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


MISTAKES: dict[str, tuple[str, Callable[[Run, pytest.MonkeyPatch], None], str, list[str]]] = {
    "target module": ("tokenize", wrong_target, "lora.targetModules", ["q_proj"]),
    "template without end": ("rehearse", answers_without_end, "model", ["<|start|>", "stop", "generation_config.json"]),
    "vocabulary": ("rehearse", small_vocabulary, "model", ["200 tokens", "tokenizer"]),
    "positions": ("tokenize", rows_beyond_the_positions, "training.maxSequenceLength", ["1024", "512 or less"]),
    "heads": ("tokenize", indivisible_heads, "parallelism.tensorParallelSize", ["2 key-value heads", "Use 1 or 2"]),
    "processes": ("tokenize", too_few_processes, "parallelism.dataParallelSize", ["processesPerNode 1", "to 1"]),
    "shared weights": ("tokenize", indivisible_copies, "parallelism.shardSize", ["dataParallelSize 2", "divisor"]),
    "no trained tokens": ("tokenize", nothing_to_train_on, "dataset", ["longer than maxSequenceLength"]),
    "learning rate": ("rehearse", overflow, "training.learningRate", ["nan", "Lower it"]),
    "row length on Trainium": ("tokenize", odd_length_on_trainium, "training.maxSequenceLength", ["512", "128"]),
    "quantized base": ("tokenize", quantized, "model", ["quantized", "bf16"]),
    "sliding window": (
        "tokenize",
        sliding_window,
        "training.maxSequenceLength",
        ["window of 64", "64 or less"],
    ),
    "memory": ("rehearse", out_of_memory, "parallelism.shardSize", ["30.0 GiB", "24 GiB", "Raise"]),
    "traced problem": ("rehearse", data_dependent_shape, "rehearse: trace", ["aten.nonzero", "rehearse.enabled"]),
    "unwritable volume": (
        "rehearse",
        unwritable_volume,
        "rehearse: prepare",
        ["small-run", "Not a directory", "Remove the file"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found_with_its_fix(
    name: str, native_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, plant, place, words = MISTAKES[name]
    run = native_run()
    plant(run, monkeypatch)
    if stage == "rehearse":
        run("tokenize")
    said = run(stage, status=2)
    message = said.splitlines()[-1]
    assert place in message
    assert not [each for each in words if each not in message]
    assert not run.paths.small_run.is_dir()
    assert not run.paths.manifest(stage).exists()


# --- broken promises of this program, which the rehearsal must notice


def refuse_to_restore(patch: pytest.MonkeyPatch) -> None:
    from llama_lora.backends.native.engine import NativeEngine

    patch.setattr(NativeEngine, "restore", lambda *arguments: None)


def merge_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Delta, "added_to", lambda delta, rows, first: rows)


def end_at_once(patch: pytest.MonkeyPatch) -> None:
    from llama_lora.backends.native.engine import NativeEngine

    patch.setattr(NativeEngine, "step", lambda *arguments: os._exit(1))


def raise_in_merge(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Delta, "added_to", lambda *arguments: {}["a tensor"])


DEFECTS = {
    "a resume without the checkpoint": (refuse_to_restore, "rehearse: resume: ", "resuming at step 2"),
    "a merge without the adapter": (merge_nothing, "merged: ", "not the trained weights"),
    "workers that end": (end_at_once, "rehearse: train: ", "stages.rehearse.resources"),
    "an unexpected error": (raise_in_merge, "rehearse: merge: ", "KeyError"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_what_fails_in_any_step_ends_with_one_message(
    name: str, native_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it, place, words = DEFECTS[name]
    run = native_run()
    run("tokenize")
    break_it(monkeypatch)
    command = [LLAMA_LORA, "rehearse", "--config", str(run.write_config()), "--workspace", str(run.workspace)]
    process = WarmPopen(command, stdout=-1, stderr=-2, text=True)
    message = process.communicate()[0].splitlines()[-1]
    assert process.returncode == 2
    assert place in message and words in message
    assert not run.paths.small_run.exists()


def test_a_run_of_xla_is_rehearsed_with_backend_native_and_without_a_trace(new_run: Callable[..., Run]) -> None:
    run = new_run(training={"attention": "eager"}, parallelism=TWO_PROCESSES)
    run.config |= {"backend": "xla", "device": "neuron"}
    run("tokenize")
    arguments = ["rehearse", "--config", str(run.write_config()), "--workspace", str(run.workspace)]
    said = llama_lora(*arguments, popen=WarmPopen)
    assert "2 workers" in said and "rehearsed in" in said
    assert "trace" not in run.manifest("rehearse")["facts"]


# --- the small model and its rows


@pytest.mark.parametrize(
    ("backend", "parallelism", "expected"),
    [
        ("native", TWO_PROCESSES, (2, 1, 1)),
        ("native", {"processesPerNode": 64, "dataParallelSize": 16, "tensorParallelSize": 4}, (1, 1, 2)),
        ("native", {"processesPerNode": 64, "dataParallelSize": 64, "shardSize": 8}, (2, 2, 1)),
        ("xla", {"processesPerNode": 32, "dataParallelSize": 4, "tensorParallelSize": 8}, (2, 1, 1)),
    ],
)
def test_two_workers_divide_the_small_model_as_the_run_does(
    backend: str, parallelism: dict[str, int], expected: tuple[int, int, int], tiny_model: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", tiny_model)
    run.config |= {"backend": backend, "parallelism": {"nodes": 1, "tensorParallelSize": 1, **parallelism}}
    layout: Parallelism = small_run.small_config(run.load()).parallelism
    assert (layout.data_parallel_size, layout.shard_size, layout.tensor_parallel_size) == expected
    assert layout.processes_per_node == 2


@pytest.mark.parametrize(("attention", "small"), [("isolatedFlash", "isolated"), ("causal", "causal")])
def test_the_small_run_isolates_examples_as_the_run_does(
    attention: str, small: str, tiny_model: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", tiny_model, training={"attention": attention})
    run.config["backend"] = "xla"
    assert small_run.small_config(run.load()).training.attention == small


@pytest.mark.parametrize("name", architectures.table())
def test_the_small_model_keeps_what_the_code_depends_on(name: str) -> None:
    config = architectures.table()[name]["config"]
    large, small = (architectures.from_config(each) for each in (config, small_run.small_model_config(config)))
    for kept in ("model_type", "vocabulary", "positions", "tied", "attention_bias", "mlp_bias", "head"):
        assert getattr(small, kept) == getattr(large, kept), kept
    assert (small.kv_heads == small.heads) == (large.kv_heads == large.heads)
    assert small.layers == 2 and small.parameters < large.parameters / 10


@pytest.mark.parametrize("model_type", architectures.MODEL_TYPES)
def test_the_small_model_is_one_of_its_type_with_the_tokenizer(model_type: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    large = make_model(tmp_path / "large", dtype="bfloat16")
    scalings = {"logits_scaling": 8.0, "embedding_multiplier": 12.0} if model_type == "granite" else {}
    change_config(
        large,
        model_type=model_type,
        architectures=[architectures.MODEL_TYPES[model_type].model_class],
        num_hidden_layers=4,
        layer_types=["full_attention"] * 4,
        head_dim=16,
        tie_word_embeddings=True,
        **scalings,
    )
    small_run.make_small_model(large, tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto")
    assert model.config.model_type == model_type and model.config.num_hidden_layers == 2
    assert str(model.dtype) == "torch.bfloat16"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert hasattr(model.model.layers[0].self_attn, "q_norm") == (model_type == "qwen3")
    read = AutoConfig.from_pretrained(tmp_path / "small")
    assert all(getattr(read, key) == value for key, value in scalings.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "small").chat_template == byte_tokenizer().chat_template


def row(*examples: tuple[int, int]) -> dict[str, list[int]]:
    """Examples of (prompt, answer) tokens, numbered."""
    ids = list(range(sum(map(sum, examples))))
    trained = [flag for prompt, answer in examples for flag in [False] * prompt + [True] * answer]
    labels = [token if flag else IGNORED for token, flag in zip(ids, trained, strict=True)]
    return {"input_ids": ids, "labels": labels, "lengths": [sum(example) for example in examples]}


def test_a_long_row_is_cut_to_the_tokens_before_the_end_of_its_last_answer() -> None:
    whole = row((3, 2), (2, 0), (4, 2), (3, 0))
    cut = trained_window(whole, 8)
    assert cut["input_ids"] == list(range(5, 13))
    assert cut["labels"] == whole["labels"][5:13]
    assert cut["lengths"] == [2, 6]
    assert trained_window(row((3, 2)), 8) == row((3, 2))


def test_rows_without_a_trained_token_are_passed_over() -> None:
    assert small_run.first_rows([row((4, 0)), row((2, 3))]) == [row((2, 3))]
    with pytest.raises(UserError, match="no row has a token to train on"):
        small_run.first_rows([row((4, 0)), row((5, 0))])


def test_the_end_of_a_truncated_answer_is_not_its_end() -> None:
    assert list(answer_ends(row((3, 2), (2, 3)), 100)) == [4, 9]
    assert list(answer_ends(row((3, 2)), 5)) == []


def test_generation_stops_at_the_tokens_of_the_generation_config(tiny_model: Path, tmp_path: Path) -> None:
    assert stop_tokens(tiny_model, byte_tokenizer()) == {258}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    assert stop_tokens(tmp_path, byte_tokenizer()) == {1, 2, 258}
