"""The memory of backend native, compared with real tensors: split parameters and what autograd keeps on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from genvalues.accelerators.architectures import MODEL_TYPES, from_config, known, target_names
from genvalues.accelerators.memory import Step
from genvalues.accelerators.native_memory import (
    LOSS_CHUNK,
    activation_bytes,
    layer_activations,
    loss_bytes,
    native_memory,
    score_bytes,
    working_bytes,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

GIB = 1 << 30
QV = ("q_proj", "v_proj")
SMALL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
MORE = {"qwen3": {"head_dim": 32}, "granite": {"tie_word_embeddings": True}}
KINDS = {name: SMALL | {"model_type": name} | MORE.get(name, {}) for name in MODEL_TYPES}


def model_of(config: dict[str, Any], targets: Any, dropout: float = 0.0, r: int = 4) -> Any:
    """A bf16 model with the fp32 adapter that PEFT makes."""
    kind = {**config}
    wanted = transformers.AutoConfig.for_model(kind.pop("model_type"), **kind)
    base = transformers.AutoModelForCausalLM.from_config(wanted, attn_implementation="sdpa").to(torch.bfloat16)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=r, target_modules=targets, lora_dropout=dropout)
    return peft.get_peft_model(base, lora).train()


def step(rows: int, length: int, targets: Any = QV, attention: str = "isolated", **more: Any) -> Step:
    made = Step(length, rows, attention, "none", 4, tuple(target_names(targets)), False)
    return made._replace(**more)


# --- what stays resident


@pytest.mark.parametrize("shard", [1, 4, 16])
@pytest.mark.parametrize("tensor", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_adapter_equal_those_of_a_split_model(kind: str, tensor: int, shard: int) -> None:
    """Every parameter by name: tensor parallel splits the linear layers, then FSDP splits rows, padded."""
    column_wise = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    base = adapter = root = layer = 0
    for name, parameter in model_of(KINDS[kind], "all-linear", r=6).named_parameters():
        local = parameter.detach()
        if any(part in name for part in column_wise) and "lora_A" not in name:
            local = local.chunk(tensor, dim=0)[0]
        elif any(part in name for part in ("o_proj", "down_proj")) and "lora_B" not in name:
            local = local.chunk(tensor, dim=1)[0]
        whole = local.numel() * local.element_size()
        held = local.chunk(shard, dim=0)[0].numel() * local.element_size()
        if ".layers." not in name:
            root += whole
        elif ".layers.0." in name:
            layer += whole
        assert parameter.requires_grad == ("lora_" in name)
        base, adapter = (base, adapter + held) if parameter.requires_grad else (base + held, adapter)
    wanted = step(1, 64, "all-linear", r=6)
    counted = native_memory(from_config(KINDS[kind]), wanted, tensor, shard, 24 * GIB)
    assert (counted.base, counted.adapter) == (base, adapter)
    assert counted.gradients == adapter
    assert counted.optimizer == 2 * adapter
    assert (counted.root, counted.layer) == ((root, layer) if shard > 1 else (0, 0)), "not wrapped by FSDP"


def test_gradients_of_several_micro_batches_are_whole_until_the_last() -> None:
    a = from_config(SMALL)
    alone, several = (native_memory(a, step(1, 64), 1, 4, 24 * GIB, accumulates=each) for each in (False, True))
    assert several.gradients == 4 * alone.gradients
    assert replace(several, gradients=alone.gradients) == alone


# --- what a micro-batch adds


def kept_by_autograd(model: Any, rows: int, length: int, attention: str) -> int:
    """Bytes of all tensors that autograd keeps for the backward pass: each storage once, without parameters."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

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
    mask = None
    if attention == "isolated":
        mask = torch.ones(length, length, dtype=torch.bool).tril().expand(rows, 1, length, length)
    kernel = SDPBackend.MATH if attention == "isolated" else SDPBackend.FLASH_ATTENTION
    decoder = model.get_base_model().model
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), sdpa_kernel(kernel):
        decoder(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(kept.values())


def kept_per_layer(kind: str, rows: int, length: int, targets: Any, attention: str, wrap: Any = None) -> float:
    """The difference between two depths excludes everything outside the layers, and the first layer, where a frozen
    base keeps nothing before its first LoRA factor."""
    kept = []
    for layers in (2, 4):
        model = model_of(KINDS[kind] | {"num_hidden_layers": layers}, targets)
        if wrap:
            wrap(model.get_base_model().model.layers)
        kept.append(kept_by_autograd(model, rows, length, attention))
    return (kept[1] - kept[0]) / 2


@pytest.mark.parametrize("attention", ["isolated", "causal"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_equal_what_autograd_keeps(kind: str, targets: Any, attention: str) -> None:
    """Within 1 %: variances and the like are not counted."""
    if attention == "causal" and int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("transformers 4 repeats key and value heads before the flash kernel")
    rows, length = 2, 64
    a, wanted = from_config(KINDS[kind]), step(rows, length, targets, attention)
    kept = kept_per_layer(kind, rows, length, targets, attention)
    assert kept == pytest.approx(layer_activations(a, wanted, 1).total, rel=0.01)
    first, more = (activation_bytes(from_config(KINDS[kind] | {"num_hidden_layers": n}), wanted, 1) for n in (1, 3))
    assert (more - first) / 2 == pytest.approx(layer_activations(a, wanted, 1).total, rel=1e-6)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_recomputation_keeps_the_inputs_of_what_it_repeats(checkpointing: str) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def wrap(layers: Any) -> None:
        for index, layer in enumerate(layers):
            if checkpointing == "full":
                layers[index] = checkpoint_wrapper(layer)
            else:
                layer.self_attn = checkpoint_wrapper(layer.self_attn)

    rows, length = 2, 64
    kept = kept_per_layer("llama", rows, length, list(QV), "isolated", wrap)
    if checkpointing == "selective":  # transformers passes it by name, and a checkpoint keeps that outside autograd
        kept += 2 * rows * length * 128
    wanted = step(rows, length, checkpointing=checkpointing)
    one, three = (activation_bytes(from_config(SMALL | {"num_hidden_layers": n}), wanted, 1) for n in (1, 3))
    assert kept == pytest.approx((three - one) / 2, rel=0.01)
    if checkpointing == "full":
        assert (three - one) / 2 == 2 * rows * length * 128, "2 s b h"


def test_dropout_keeps_a_mask_of_one_byte_per_target() -> None:
    """native_dropout, which torch uses on accelerators."""
    a, rows, length = from_config(SMALL), 2, 64
    without, with_dropout = (layer_activations(a, step(rows, length, dropout=each), 1) for each in (False, True))
    hidden = torch.ones(rows, length, a.hidden)
    _, mask = torch.ops.aten.native_dropout(hidden, 0.5, True)
    assert with_dropout.attention - without.attention == len(QV) * mask.untyped_storage().nbytes()


def test_the_loss_has_the_logits_of_one_chunk() -> None:
    a = known("meta-llama/Llama-3.1-8B")
    assert a is not None
    whole = 4 * 8192 * a.vocabulary
    assert loss_bytes(a, step(1, 8192)) < whole / 8
    assert loss_bytes(a, step(1, 8192)) == 3 * 4 * LOSS_CHUNK * a.vocabulary + 2 * 8192 * a.hidden


def test_causal_attention_has_no_matrix_of_scores() -> None:
    a = known("meta-llama/Llama-3.1-8B")
    assert a is not None
    isolated, causal = (
        native_memory(a, step(1, 4096, attention=each), 1, 4, 24 * GIB) for each in ("isolated", "causal")
    )
    scores = 4096 * score_bytes(a, step(1, 4096), 1)
    assert scores == 32 * 4096**2 * 4
    assert isolated.activations - causal.activations > a.layers * scores
    assert isolated.working - causal.working > scores


def test_tensor_parallelism_splits_heads_and_mlp_but_not_the_hidden_state() -> None:
    """Without sequence parallelism the norms' fp32 inputs are whole on each worker."""
    a = known("meta-llama/Llama-3.1-8B")
    assert a is not None
    whole, cut = (layer_activations(a, step(1, 2048, ("o_proj",), r=1), size) for size in (1, 4))
    assert whole.norms == cut.norms
    assert whole.attention / cut.attention == pytest.approx(4, rel=0.001)
    assert whole.mlp / cut.mlp == 4


@pytest.mark.parametrize("tensor", [1, 4])
@pytest.mark.parametrize("attention", ["isolated", "causal"])
def test_more_recomputation_keeps_less_and_needs_more_working_memory(tensor: int, attention: str) -> None:
    a = known("meta-llama/Llama-3.1-8B")
    assert a is not None
    steps = [step(1, 2048, attention=attention, checkpointing=each) for each in ("none", "selective", "full")]
    kept = [activation_bytes(a, each, tensor) for each in steps]
    work = [working_bytes(a, each, tensor) for each in steps]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 3
    assert work == sorted(work)


# --- the peak


def test_llama_8b_on_four_trn2_cores() -> None:
    """By hand: 8,030,261,248 parameters in bf16, a quarter on each core; 2 x 128256 x 4096 + 4096 in the root."""
    a = known("meta-llama/Llama-3.1-8B")
    assert a is not None
    counted = native_memory(a, step(1, 2048, r=16, dropout=True, checkpointing="selective"), 1, 4, 24 * GIB)
    assert counted.base == 2 * 8_030_261_248 // 4
    assert counted.root == 2 * (2 * 128256 * 4096 + 4096)
    assert counted.gathered == counted.root + 2 * counted.layer
    assert counted.reserved == 3 * GIB
    parts = (counted.base, counted.adapter, counted.gradients, counted.optimizer, counted.gathered)
    assert counted.peak == sum(parts) + counted.activations + counted.working
    assert counted.fits
    assert not native_memory(a, step(1, 2048, checkpointing="none"), 1, 1, 24 * GIB).fits


def test_the_peak_is_at_the_start_where_the_root_is_most_of_the_model() -> None:
    a = from_config(SMALL | {"vocab_size": 100_000})
    counted = native_memory(a, step(1, 8, checkpointing="full"), 1, 64, 24 * GIB)
    resident = counted.base + counted.adapter + counted.gradients + counted.optimizer
    assert counted.peak == resident + 2 * counted.root + counted.layer
