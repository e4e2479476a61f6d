"""Computed memory, compared with real tensors: split weights, optimum-neuron's checkpoints, autograd's tensors."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from genvalues.accelerators.architectures import LINEAR, MODEL_TYPES, from_config, known, target_names
from genvalues.accelerators.memory import Step
from genvalues.accelerators.xla_memory import (
    activation_bytes,
    gradient_bytes,
    layer_bytes,
    logit_bytes,
    lora_factors,
    optimizer_bytes,
    score_bytes,
    weights,
    working_bytes,
    xla_memory,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

FIXTURES = Path(__file__).parents[2] / "trainer/fixtures/neuron"
GIB = 1 << 30
SMALL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
MORE = {"qwen3": {"head_dim": 32}, "granite": {"tie_word_embeddings": True}}
KINDS = {name: SMALL | {"model_type": name} | MORE.get(name, {}) for name in MODEL_TYPES} | {
    "tied": SMALL | {"tie_word_embeddings": True}
}


def model_of(config: dict[str, Any], attention: str = "eager") -> Any:
    kind = {**config}
    wanted = transformers.AutoConfig.for_model(kind.pop("model_type"), **kind)
    return transformers.AutoModelForCausalLM.from_config(wanted, attn_implementation=attention)


# --- what stays resident


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_equal_those_of_a_split_model(kind: str, size: int) -> None:
    """Every parameter split as optimum-neuron does, by name; 4 key-value heads are replicated for 8 workers."""
    config = KINDS[kind]
    model, rank = model_of(config), 0
    counted = 0
    for name, parameter in model.named_parameters():
        part = name.split(".")[-2]
        if part in ("k_proj", "v_proj") and size > 4:
            heads = parameter.view(4, -1, parameter.shape[1]).repeat_interleave(size // 4, dim=0)
            counted += heads.chunk(size, dim=0)[rank].numel()
        elif part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            counted += parameter.chunk(size, dim=0)[rank].numel()
        elif part in ("o_proj", "down_proj"):
            counted += parameter.chunk(size, dim=1)[rank].numel()
        elif part in ("embed_tokens", "lm_head") and MODEL_TYPES[config["model_type"]].splits_vocabulary:
            counted += parameter.chunk(size, dim=0)[rank].numel()
        else:
            counted += parameter.numel()
    assert weights(from_config(config), size) == counted
    assert weights(from_config(config), 1) == from_config(config).parameters


# llama-tp2-fused is not listed: it has fuse_qkv, which the Neuron backend does not use. It fuses q, k and v only where
# key-value heads are replicated (llama-tp4-gqa).
FOLDERS = {
    "llama-tp1": 1,
    "llama-tp2-qv": 2,
    "llama-tp4-gqa": 4,
    "llama-tp4-gqa-fused": 4,
    "qwen3-tp2": 2,
    "granite-tp2-plain": 2,
}


@pytest.mark.parametrize("name", FOLDERS)
def test_lora_equals_a_workers_shard_of_optimum_neuron(name: str, tmp_path: Path) -> None:
    """The numbers in each rank's shard of a checkpoint saved by optimum-neuron 0.4.5."""
    with tarfile.open(FIXTURES / f"{name}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    config = json.loads((tmp_path / "base/config.json").read_text())
    adapter = json.loads((tmp_path / "checkpoint/adapter_default/adapter_config.json").read_text())
    shards = sorted(
        (tmp_path / "checkpoint/adapter_default/adapter_shards/model").glob("dp_rank_00_tp_rank_*_pp_rank_00.pt")
    )
    assert len(shards) == FOLDERS[name]
    for shard in shards:
        tensors = Path(f"{shard}.tensors")
        parts = list(tensors.glob("*.pt")) if tensors.is_dir() else [shard]
        held = 0
        for part in parts:
            loaded = torch.load(part, weights_only=True)
            held += sum(each.numel() for each in (loaded.values() if isinstance(loaded, dict) else [loaded]))
        targets = [each for each in LINEAR if each in _targets(adapter["target_modules"])]
        counted = lora_factors(from_config(config), adapter["r"], targets, FOLDERS[name])
        assert sum(rows * columns for rows, columns in counted) == held


def _targets(named: list[str]) -> set[str]:
    """By the base model's names; optimum-neuron also writes those of its fused layers."""
    fused = {"qkv_proj": {"q_proj", "k_proj", "v_proj"}, "gate_up_proj": {"gate_proj", "up_proj"}}
    return set().union(*(fused.get(name, {name}) for name in named))


def test_zero_1_shards_the_optimizer_with_padding() -> None:
    factors = [(16, 100), (64, 16)]
    whole = 12 * (16 * 100 + 64 * 16)
    assert optimizer_bytes(factors, 1) == whole
    assert optimizer_bytes(factors, 4) * 4 == whole
    assert optimizer_bytes(factors, 32) == 12 * (1 * 100 + 2 * 16), (
        "16 rows on 32 copies: one row each, half of them padding"
    )
    assert gradient_bytes(factors, 4) == 4 * (16 * 100 + 64 * 16) + optimizer_bytes(factors, 4) // 3


# --- what a micro-batch adds


def saved_by_autograd(model: Any, rows: int, length: int, loss: bool) -> int:
    """Bytes of all tensors that autograd keeps for the backward pass: each storage once, without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # keeps its address from being reused
        return tensor

    ids = torch.randint(0, 500, (rows, length))
    causal = torch.full((length, length), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16).triu(1)
    mask = causal.expand(rows, 1, length, length)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if loss:
            torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="sum")
    return sum(kept.values())


def wrapped(config: dict[str, Any], targets: Any, dropout: float) -> Any:
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, lora_dropout=dropout)
    return peft.get_peft_model(model_of(config).to(torch.bfloat16), lora).to(torch.bfloat16).train()


def step(rows: int, length: int, targets: Any, dropout: float, checkpointing: str = "none") -> Step:
    return Step(length, rows, "isolated", checkpointing, 4, tuple(target_names(targets)), dropout > 0)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_equal_what_autograd_keeps(kind: str, targets: Any, dropout: float) -> None:
    """For a small model on the CPU, in bf16, within 1 %: variances and the like are not counted.

    The difference between two depths excludes everything outside the layers, and the first layer, where a frozen base
    keeps nothing before its first LoRA factor.
    """
    rows, length = 2, 32
    kept = [
        saved_by_autograd(
            wrapped(KINDS[kind] | {"num_hidden_layers": layers}, targets, dropout), rows, length, loss=False
        )
        for layers in (2, 4)
    ]
    a, wanted = from_config(KINDS[kind]), step(rows, length, targets, dropout)
    counted = layer_bytes(a, wanted, 1) + score_bytes(a, wanted, 1)
    # Here PEFT has an A each for gate and up; on Neuron they share one.
    if targets == "all-linear" and dropout:
        counted += wanted.tokens * 4 * a.hidden
    assert (kept[1] - kept[0]) / 2 == pytest.approx(counted, rel=0.01)


def test_logits_are_the_tensors_of_the_loss() -> None:
    rows, length = 2, 64
    model, a = wrapped(SMALL, ["q_proj"], 0.0), from_config(SMALL)
    without, with_loss = (saved_by_autograd(model, rows, length, loss) for loss in (False, True))
    # torch's loss keeps log-probabilities in fp32 and the labels, besides the bf16 logits and their fp32 copy.
    softmax = 4 * rows * length * a.vocabulary
    assert with_loss - without == pytest.approx(softmax, rel=0.005)
    assert logit_bytes(a, step(rows, length, ["q_proj"], 0.0), 1) == 2.5 * softmax


def test_recomputed_attention_keeps_no_scores() -> None:
    """As in the Neuron backend, only the attention is in a checkpoint: here transformers' eager attention."""
    from torch.utils.checkpoint import checkpoint
    from transformers.models.llama import modeling_llama

    attention = modeling_llama.eager_attention_forward

    def again(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> tuple[Any, None]:
        def output(query: Any, key: Any, value: Any) -> Any:
            return attention(module, query, key, value, mask, **options)[0]

        return checkpoint(output, query, key, value, use_reentrant=False), None

    rows, length, targets = 2, 128, ["q_proj", "v_proj"]
    kept = []
    modeling_llama.eager_attention_forward = again
    try:
        for layers in (2, 4):
            model = wrapped(SMALL | {"num_hidden_layers": layers}, targets, 0.1)
            kept.append(saved_by_autograd(model, rows, length, loss=False))
    finally:
        modeling_llama.eager_attention_forward = attention
    counted = layer_bytes(from_config(SMALL), step(rows, length, targets, 0.1, "selective"), 1)
    assert (kept[1] - kept[0]) / 2 == pytest.approx(counted, rel=0.01)


def test_recomputed_layers_keep_only_their_input() -> None:
    rows, length, targets = 2, 128, ["q_proj", "v_proj"]
    kept = []
    for layers in (2, 4):
        model = wrapped(SMALL | {"num_hidden_layers": layers}, targets, 0.1)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        kept.append(saved_by_autograd(model, rows, length, loss=False))
    a = from_config(SMALL)
    one, three = (
        activation_bytes(
            from_config(SMALL | {"num_hidden_layers": layers}), step(rows, length, targets, 0.1, "full"), 1
        )
        for layers in (1, 3)
    )
    assert (three - one) / 2 == 2 * rows * length * a.hidden, "2 s b h"
    assert (kept[1] - kept[0]) / 2 == pytest.approx(2 * rows * length * a.hidden, rel=0.01)


LLAMA_8B = known("meta-llama/Llama-3.1-8B")
QV = ("q_proj", "v_proj")


def test_tensor_parallelism_splits_every_activation() -> None:
    """Korthikanti et al. 2022, equation 4: with sequence parallelism a layer's activations are all divided."""
    assert LLAMA_8B is not None
    whole, cut = (layer_bytes(LLAMA_8B, Step(2048, 1, "isolated", "none", 16, QV, True), size) for size in (1, 8))
    assert whole / cut == pytest.approx(8, rel=0.01)
    # 34 s b h per layer in their GPT, which is fully trained and has an MLP of 4 h.
    assert whole / (2048 * 4096) == pytest.approx(40, rel=0.01)


def test_flash_keeps_no_scores_with_and_without_selective() -> None:
    assert LLAMA_8B is not None
    flash, eager = (Step(4096, 1, attention, "none", 16, QV, True) for attention in ("causal", "isolated"))
    assert score_bytes(LLAMA_8B, flash, 8) == 0
    assert score_bytes(LLAMA_8B, eager, 8) > 6 * 4 * 4096**2
    selective = Step(4096, 1, "causal", "selective", 16, QV, True)
    assert activation_bytes(LLAMA_8B, flash, 8) == activation_bytes(LLAMA_8B, selective, 8)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_more_recomputation_keeps_less_and_needs_more_working_memory(size: int) -> None:
    assert LLAMA_8B is not None
    steps = [Step(2048, 1, "isolated", checkpointing, 16, QV, True) for checkpointing in ("none", "selective", "full")]
    kept = [activation_bytes(LLAMA_8B, each, size) for each in steps]
    work = [working_bytes(LLAMA_8B, each, size) for each in steps]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 3
    assert work == sorted(work)


def test_llama_8b_on_a_trn1_core() -> None:
    """By hand: 8.03e9 parameters x 2 bytes / 8 are 1.87 GiB; the norms' 266,240 numbers are whole on every core."""
    assert LLAMA_8B is not None
    counted = xla_memory(LLAMA_8B, Step(2048, 1, "isolated", "selective", 16, QV, True), 8, 4, 16 * GIB)
    assert counted.weights == 2 * ((8_030_261_248 - 266_240) // 8 + 266_240)
    assert counted.reserved == 2 * GIB
    assert counted.total == sum(
        getattr(counted, name)
        for name in ("weights", "lora", "gradients", "optimizer", "activations", "logits", "working", "reserved")
    )
    assert counted.fits
    assert not xla_memory(LLAMA_8B, Step(2048, 1, "isolated", "full", 16, QV, True), 1, 32, 16 * GIB).fits
