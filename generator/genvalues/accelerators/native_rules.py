"""Rules of backend native: which models, layouts and row lengths it can train.

Check, planner and trainer share these rules and their wording. The first key of a Problem is the setting to change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from genvalues.accelerators.architectures import Architecture
from genvalues.accelerators.neuron_rules import (
    ATTENTION,
    LENGTH,
    MODEL,
    TENSOR_PARALLEL,
    either,
    multiples,
    position_problems,
    supported_models,
)
from genvalues.common.problems import Problem, key_paths

# TorchNeuron's flash attention takes rows of a multiple of 512 tokens and heads of up to 128 features
# (aws-neuron/torch-neuronx, scaled_dot_product_fused_attention.py). Rows are padded to the run's length, so that no
# step is a new graph; a multiple of 512 serves any attention.
ROWS = 512
HEAD = 128


def model_problems(architecture: Architecture) -> Iterator[Problem]:
    """What the engine cannot train whatever the layout. The other rules apply to the remaining models."""
    a = architecture
    if not a.supported:
        named = a.model_class or f"model type {a.model_type}"
        yield Problem(MODEL, f"{named} is not supported by backend native", f"Use one of {supported_models()}.")
        return
    yield from weight_problems(a)


def weight_problems(architecture: Architecture) -> Iterator[Problem]:
    """What the engine cannot train of any model type: on the CPU it trains others than the supported ones."""
    a = architecture
    if a.heads % a.kv_heads:  # transformers: LlamaAttention, num_key_value_groups
        what = f"num_attention_heads {a.heads} is not divisible by num_key_value_heads {a.kv_heads}"
        yield Problem(MODEL, what, "Use another model.")
    if a.quantized:
        yield Problem(MODEL, "backend native cannot train quantized weights", "Use the model's bf16 weights.")


def size_problems(architecture: Architecture, size: int, sizes: Iterable[int] = ()) -> Iterator[Problem]:
    """Why a model cannot be split over tensor-parallel groups of ``size``. ``sizes`` are alternatives to suggest."""
    for what in _size_rules(architecture, size):
        possible = either(possible_sizes(architecture, sizes))
        yield Problem(key_paths(TENSOR_PARALLEL), what, f"Use {possible}." if possible else "Use a smaller size.")


def possible_sizes(architecture: Architecture, sizes: Iterable[int]) -> list[int]:
    """Those tensor-parallel sizes over which the model can be split."""
    return [size for size in sizes if not any(_size_rules(architecture, size))]


def _size_rules(architecture: Architecture, size: int) -> Iterator[str]:
    """Tensor parallelism splits heads and the MLP. Embedding and output layer are whole in each group."""
    a = architecture
    for what, number in (("attention heads", a.heads), ("key-value heads", a.kv_heads)):
        if number % size:
            yield f"the model's {number} {what} are not divisible by {size}"
    if a.intermediate % size:
        yield f"the model's intermediate size {a.intermediate} is not divisible by {size}"


def length_problems(
    length: int, attention: str, device: str, architecture: Architecture | None = None
) -> Iterator[Problem]:
    """Row lengths that the model or the device cannot take. ``architecture`` None: the model is not known."""
    a, unit = architecture, ROWS if device == "neuron" else 1
    if attention == "isolatedFlash":
        yield Problem(key_paths(ATTENTION), "isolatedFlash requires backend xla", "Use isolated.")
    if a and device == "neuron" and attention == "causal" and a.head > HEAD:
        what = f"causal attention supports heads of up to {HEAD} features on Trainium, the model's have {a.head}"
        yield Problem(key_paths(ATTENTION), what, "Use isolated.")
    if a and a.sliding_window is not None and length > a.sliding_window:
        # No attention of the engine has a window. In rows that are not longer than it, there is no difference.
        most = a.sliding_window // unit * unit
        what = f"{length} is more than the model's sliding window of {a.sliding_window}, which backend native ignores"
        fix = f"Use {most} or less." if most > 0 else "Use a model without a sliding window."
        yield Problem(key_paths(LENGTH), what, fix)
    if a and length > a.positions:
        yield from position_problems(length, a.positions, unit)
    elif length % unit:
        near = multiples(length, unit, a.positions if a else None)
        fix = f"Use {either(near)}." if near else "Use another model."
        yield Problem(
            key_paths(LENGTH),
            f"backend native needs a maxSequenceLength that is a multiple of {unit} on Trainium, not {length}",
            fix,
        )
