"""A streamed model against the same model in memory, as transformers and PEFT load it."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llama_lora import streaming
from llama_lora.data.batches import Batch, make_batch
from llama_lora.losses import row_loss_sums
from llama_lora.streaming import StreamedModel
from trainer.conftest import make_model
from trainer.test_merge import make_adapter

SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SCALINGS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 4.0}
WINDOW = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}
ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 64}
ROPE |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama 3.1": ("Llama", {"rope_scaling": ROPE}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "sliding window": ("Qwen3", {"head_dim": 16, **WINDOW}),
    "granite": ("Granite", SCALINGS),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
}


def model_of(folder: Path, kind: str, dtype: str) -> Path:
    name, changes = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{"tie_word_embeddings": False, **SIZES, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(getattr(torch, dtype))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


def rows_of(*lengths: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in lengths:
        ids = torch.randint(0, 256, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]], "lengths": [length - length // 3, length // 3]})
    return rows


def in_memory(folder: Path, adapter: Path | None, batches: list[Batch]) -> list[torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="sdpa")
    if adapter:
        from peft import PeftModel

        in_fp32 = b'"F32"' in (adapter / "adapter_model.safetensors").read_bytes()
        model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=in_fp32)
    with torch.no_grad():
        return [row_loss_sums(model.eval(), batch) for batch in batches]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_the_losses_are_those_of_the_model_in_memory(tmp_path: Path, kind: str, dtype: str, isolated: bool) -> None:
    folder = model_of(tmp_path, kind, dtype)
    batches = [make_batch(rows_of(40, 31), isolated), make_batch(rows_of(17), isolated)]
    assert_same(StreamedModel(folder).row_losses(batches), in_memory(folder, None, batches))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"target_modules": "all-linear", "use_rslora": True}])
def test_an_adapter_is_applied_as_peft_does(
    tmp_path: Path, dtype: str, adapter_dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    base = make_model(tmp_path / "base", dtype)
    adapter = make_adapter(base, tmp_path / "adapter", adapter_dtype, **settings)
    batches = [make_batch(rows_of(40, 31))]
    expected = in_memory(base, adapter, batches)
    assert_same(StreamedModel(base, adapter).row_losses(batches), expected)
    assert not torch.allclose(expected[0], in_memory(base, None, batches)[0]), "the adapter changes the loss"


def test_logits_of_few_tokens_exist_at_a_time_and_of_trained_ones_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path)
    batches = [make_batch(rows_of(40, 31))]
    monkeypatch.setattr(streaming, "LOGITS", 259 * 12 * 14)  # of fourteen tokens
    seen = []
    monkeypatch.setattr(
        streaming.F, "cross_entropy", lambda *given, real=streaming.F.cross_entropy, **more: seen.append(
            given[0].shape[0]) or real(*given, **more)
    )  # fmt: skip
    found = StreamedModel(folder).row_losses(batches)
    assert seen == [14, 14, 14, 14, 13], "39 + 30 tokens"
    assert_same(found, in_memory(folder, None, batches))


def test_what_a_pass_keeps_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = StreamedModel(make_model(tmp_path))
    token = 4 * (32 + 2 * 8)  # hidden state, cosine and sine of 32 features in heads of 8, fp32
    monkeypatch.setattr(streaming, "HIDDEN_STATES", 2 * 40 * (token + 40))
    assert model.passes([(1, 40)] * 5) == [[0, 1], [2, 3], [4]]
    assert model.passes([(9, 400), (1, 40), (1, 40)]) == [[0], [1, 2]], "a batch that is larger is alone"


def test_each_weight_is_read_once_in_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = StreamedModel(make_model(tmp_path))
    reads: list[int] = []
    read = streaming.read_into
    monkeypatch.setattr(
        streaming, "read_into", lambda target, file, tensor: reads.append(tensor.begin) or read(target, file, tensor)
    )
    model.row_losses([make_batch(rows_of(40)), make_batch(rows_of(31)), make_batch(rows_of(17))])
    assert len(reads) == len(set(reads)) == len(load_file(tmp_path / "model.safetensors"))


def peak_of(work: Callable[[], object]) -> float:
    """MB by which the memory of this process grows at most while ``work`` runs."""

    def status(key: str) -> float:
        text = Path("/proc/self/status").read_text(encoding="ascii")
        return int(text.partition(f"{key}:")[2].split()[0]) / 1000

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, proc(5)
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def large_model(folder: Path, layers: int) -> tuple[Path, Path]:
    """A model with layers of 15 MB, and an adapter of it."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": layers}
    base = make_model(folder / "base", **sizes)
    factors = {
        f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_{kind}.weight": torch.rand(shape)
        for layer in range(layers)
        for kind, shape in (("A", (1, 2048)), ("B", (512, 1)))
    }
    (folder / "adapter").mkdir()
    save_file(factors, folder / "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["down_proj"]}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config))
    return base, folder / "adapter"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the memory of a process from Linux")
def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """12 layers more are 180 MB more of weights."""
    from llama_lora.stages.merge import merge_adapter

    batches = [make_batch(rows_of(8))]
    models = {layers: large_model(tmp_path / str(layers), layers) for layers in (2, 4, 16)}  # 2: what is used first

    def stream(layers: int) -> float:
        return peak_of(lambda: StreamedModel(*models[layers]).row_losses(batches))

    def merge(layers: int) -> float:
        return peak_of(lambda: merge_adapter(*models[layers], tmp_path / f"merged{layers}"))

    for measure in (stream, merge):
        _, few, many = (measure(layers) for layers in (2, 4, 16))
        assert many - few < 40 and many < 100, f"{measure.__name__}: {few:.0f} and {many:.0f} MB"
