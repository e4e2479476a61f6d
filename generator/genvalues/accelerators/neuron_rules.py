"""Rules of the Neuron backend: which models, LoRA targets, layouts and row lengths it can train.

Check, planner and trainer share these rules and their wording. Each rule names the function it comes from, in
optimum-neuron 0.4.5 or in neuronx_distributed of Neuron 2.26 (NxD). The first key of a Problem is the setting to
change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from genvalues.accelerators.architectures import GATE_UP, MODEL_TYPES, QUERY_KEY_VALUE, Architecture
from genvalues.accelerators.instances import trainium
from genvalues.accelerators.memory import keeps_scores
from genvalues.common.problems import Problem, key_paths

# NxD kernels/flash_attn.py, nki_flash_attn_func: "multiples of 2K". The kernel that it calls takes heads of up to 128
# (flash_fwd in aws-neuron/nki-samples, src/nki_samples/reference/attention.py: the head is its partition dimension).
FLASH_ROWS = 2048
FLASH_HEAD = 128
MODEL = key_paths("model")
ATTENTION, LENGTH = "training.attention", "training.maxSequenceLength"
TARGETS, TENSOR_PARALLEL = "lora.targetModules", "parallelism.tensorParallelSize"
SHARD_SIZE = "parallelism.shardSize"


def model_problems(architecture: Architecture) -> Iterator[Problem]:
    """What optimum-neuron cannot train whatever the settings. The other rules apply to the remaining models."""
    a = architecture
    if not a.supported:
        named = a.model_class or f"model type {a.model_type}"
        yield Problem(MODEL, f"{named} is not supported by optimum-neuron 0.4.5", f"Use one of {supported_models()}.")
        return
    # LlamaAttention and LlamaMLP create every layer with bias=False and would silently ignore the biases' weights.
    for key, present in (("attention_bias", a.attention_bias), ("mlp_bias", a.mlp_bias)):
        if present:
            yield Problem(MODEL, f"{key} is true; optimum-neuron ignores biases", "Use a model without biases.")
    # modeling_utils.py, from_pretrained: the code for quantized weights is left out.
    if a.quantized:
        yield Problem(MODEL, "optimum-neuron cannot train quantized weights", "Use the model's bf16 weights.")
    # Qwen3Model.__init__ raises.
    if a.sliding_window:
        yield Problem(
            MODEL,
            f"sliding_window is {a.sliding_window}; optimum-neuron does not support sliding windows",
            "Set use_sliding_window to false in config.json if the model was trained without one.",
        )
    if a.hidden % a.heads:  # LlamaAttention.__init__
        what = f"hidden_size {a.hidden} is not divisible by num_attention_heads {a.heads}"
        yield Problem(MODEL, what, "Use another model.")
    if a.heads % a.kv_heads:  # LlamaAttention.__init__: num_key_value_groups
        what = f"num_attention_heads {a.heads} is not divisible by num_key_value_heads {a.kv_heads}"
        yield Problem(MODEL, what, "Use another model.")


def target_problems(targets: Sequence[str]) -> Iterator[Problem]:
    """LoRA targets that no layout can train."""
    # FusedLinearsSpec.adapt_peft_config: LlamaMLP has one gate_up_proj for both.
    if missing := _missing(GATE_UP, targets):
        (present,) = (name for name in GATE_UP if name in targets)
        yield Problem(
            key_paths(TARGETS),
            f"{present} without {missing[0]}: on Trainium the two are one layer, so LoRA must target both or neither",
            f"Add {missing[0]} or remove {present}.",
        )


def query_key_value_problems(
    architecture: Architecture, targets: Sequence[str], size: int, sizes: Iterable[int] = ()
) -> Iterator[Problem]:
    """LoRA targets that cannot be trained with tensor-parallel groups of ``size``. ``sizes`` are alternatives."""
    # GQAQKVColumnParallelLinearSpec.adapt_peft_config: with replicated key-value heads LlamaAttention has one qkv_proj.
    a, missing = architecture, _missing(QUERY_KEY_VALUE, targets)
    if a.kv_heads % size and missing:
        separate = [each for each in sizes if a.kv_heads % each == 0]
        other_size = f", or set tensorParallelSize to {either(separate)}" if separate else ""
        yield Problem(
            key_paths(TARGETS, TENSOR_PARALLEL),
            f"with tensorParallelSize {size} the {a.kv_heads} key-value heads are replicated, so LoRA must target q, k "
            f"and v together (missing: {', '.join(missing)})",
            f"Add {' and '.join(missing)}{other_size}.",
        )


def size_problems(
    architecture: Architecture, size: int, target: str | None, sizes: Iterable[int] = ()
) -> Iterator[Problem]:
    """Why a model cannot be split over tensor-parallel groups of ``size``.

    ``target`` is trn1 or trn2, None where it is not known; ``sizes`` are the alternatives to suggest from.
    """
    for what in _size_rules(architecture, size, target):
        possible = either(possible_sizes(architecture, sizes, target))
        yield Problem(key_paths(TENSOR_PARALLEL), what, f"Use {possible}." if possible else "Use another model.")


def possible_sizes(architecture: Architecture, sizes: Iterable[int], target: str | None) -> list[int]:
    """Those tensor-parallel sizes over which the model can be split."""
    return [size for size in sizes if not any(_size_rules(architecture, size, target))]


def _size_rules(architecture: Architecture, size: int, target: str | None) -> Iterator[str]:
    # No layer splits hidden_size, so there is no rule for it.
    a = architecture
    if a.heads % size:  # LlamaAttention.__init__: neuronx_dist_utils.divide
        yield f"the model's {a.heads} attention heads are not divisible by {size}"
    # LlamaAttention.__init__ replicates key-value heads for more workers than there are (config.py,
    # auto_kv_size_multiplier: size // kv_heads times), and divides the copies among the workers.
    if a.kv_heads % size and size % a.kv_heads:
        yield f"{size} is neither a divisor nor a multiple of the model's {a.kv_heads} key-value heads"
    if a.intermediate % size:  # LlamaMLP.__init__
        yield f"the model's intermediate size {a.intermediate} is not divisible by {size}"
    # LlamaModel and Qwen3Model: NxD's ParallelEmbedding (EmbeddingUtility.range_from_global_vocab_size) and lm_head.
    if a.splits_vocabulary and a.vocabulary % size:
        yield f"the model's vocabulary size {a.vocabulary} is not divisible by {size}"
    # NxD parallel_state.py, arrange_kv_groups: on Trn2 the gradients of a kv head's copies are summed over neighbouring
    # workers, but optimum-neuron lays copies out as for Trn1 (create_kv_proj_local_weight_from_regular_weight), so that
    # gradients of different heads are added up. With one kv head all workers are one group. Measured on the CPU shim,
    # 2 kv heads on 4 workers, fp32: gradients of k's B off by 0.40 where the largest is 0.32, of the q of the layer
    # below by 0.07 of 0.24; with the shim's platform trn1 by 2e-6. The loss itself is right, so nothing shows.
    if target == "trn2" and 1 < a.kv_heads < size:
        yield (
            f"{size} is more than the model's {a.kv_heads} key-value heads: on trn2 optimum-neuron 0.4.5 computes "
            "wrong gradients for replicated heads"
        )


def group_problems(
    instance_type: str, size: int, key: str = TENSOR_PARALLEL, copies: int | None = None
) -> Iterator[Problem]:
    """Process groups that Neuron cannot create on a Trainium instance: see ``instances.Generation.groups``.

    ``copies``: the number that the right size has to divide, if it is known.
    """
    instance = trainium(instance_type)
    if instance and size not in instance.groups:
        what = f"{instance_type} supports process groups of {either(instance.groups)}, not of {size}"
        fitting = [each for each in instance.groups if not copies or copies % each == 0]
        yield Problem(key_paths(key, "instance"), what, f"Use {either(fitting)}.")


def length_problems(architecture: Architecture, length: int, attention: str, size: int = 1) -> Iterator[Problem]:
    """Row lengths that the model or its attention cannot take, or that groups of ``size`` cannot split."""
    a, flash = architecture, not keeps_scores(attention)
    unit = math.lcm(size, FLASH_ROWS if flash else 1)
    if flash and a.head > FLASH_HEAD:
        what = f"{attention} attention supports heads of up to {FLASH_HEAD} features, the model's have {a.head}"
        yield Problem(key_paths(ATTENTION), what, "Use isolated.")
    if length > a.positions:
        yield from position_problems(length, a.positions, unit)
    elif flash and length % FLASH_ROWS:
        yield from flash_length_problems(length, attention, a.positions, unit)
    elif length % size:
        # NxD mappings.py, _split_along_dim: sequence parallelism, always on with tensor parallelism, splits each row.
        near = multiples(length, unit, a.positions)
        yield Problem(
            key_paths(LENGTH, TENSOR_PARALLEL),
            f"rows of {length} tokens are not divisible by tensorParallelSize {size}, as sequence parallelism requires",
            f"Use {either(near)}." if near else "Use a smaller tensorParallelSize.",
        )


def position_problems(length: int, positions: int, unit: int = 1) -> Iterator[Problem]:
    """Rows longer than the model supports. ``unit`` is what an allowed length is a multiple of."""
    if length > positions:
        fix = f"Use {positions // unit * unit} or less." if positions >= unit else "Use another model."
        yield Problem(key_paths(LENGTH), f"{length} is more than the {positions} positions of the model", fix)


def flash_length_problems(
    length: int, attention: str, positions: int | None = None, unit: int = FLASH_ROWS
) -> Iterator[Problem]:
    """Row lengths that flash attention does not support; ``positions`` None: the model is not known."""
    if length % FLASH_ROWS:
        near = multiples(length, unit, positions)
        isolated = "set attention to isolated"
        fix = f"Set maxSequenceLength to {either(near)}, or {isolated}." if near else f"{isolated.capitalize()}."
        what = f"{attention} attention needs a maxSequenceLength that is a multiple of {FLASH_ROWS}, not {length}"
        yield Problem(key_paths(ATTENTION, LENGTH), what, fix)


def packed_flash_problems(attention: str | None, packing: bool | None, row_format: str | None) -> Iterator[Problem]:
    """Works, but is unlikely to be intended."""
    if attention == "causal" and packing and row_format != "text":
        yield Problem(
            key_paths(ATTENTION),
            f"with attention: causal each packed example of format {row_format} attends to those before it in its row",
            "Write attention: isolated or packing: false to keep them apart.",
        )


def process_problems(nodes: int, per_node: int, tensor: int, data: int) -> Iterator[Problem]:
    """Process counts that do not match the groups (NxD parallel_state.py, initialize_model_parallel)."""
    processes = nodes * per_node
    if processes != tensor * data:
        names = ("nodes", "processesPerNode", "tensorParallelSize", "dataParallelSize")
        fix = "Set tensorParallelSize to a divisor of the processes."
        if processes % tensor == 0:
            names = ("dataParallelSize", *names[:3])
            fix = f"Set dataParallelSize to {processes // tensor}."
        yield Problem(
            key_paths(*(f"parallelism.{name}" for name in names)),
            f"nodes {nodes} x processesPerNode {per_node} = {processes} is not tensorParallelSize {tensor} x "
            f"dataParallelSize {data}",
            fix,
        )


def shard_problems(backend: str | None, size: int, copies: int | None) -> Iterator[Problem]:
    """Copies of the model that cannot share base weights in groups of ``size``. None is not known."""
    if size > 1 and backend == "xla":
        yield Problem(key_paths(SHARD_SIZE, "backend"), "requires backend native", "Write 1.")
    elif copies and copies % size:
        what = f"{size} does not divide dataParallelSize {copies}"
        yield Problem(key_paths(SHARD_SIZE, "parallelism.dataParallelSize"), what, "Write a divisor of it.")


def supported_models() -> str:
    return ", ".join(f"{kind.model_class} ({kind.models})" for kind in MODEL_TYPES.values())


def either(choices: Sequence[object]) -> str:
    """``1, 2, 4 or 8``"""
    *others, last = map(str, choices or [""])
    return f"{', '.join(others)} or {last}" if others else last


def _missing(together: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Layers that are missing where some of a fused group are targets."""
    missing = [name for name in together if name not in targets]
    return missing if len(missing) < len(together) else []


def multiples(length: int, unit: int, most: int | None) -> list[int]:
    """The multiples of ``unit`` below and above a length."""
    lower = length // unit * unit
    return [each for each in (lower, lower + unit) if each and (most is None or each <= most)]
