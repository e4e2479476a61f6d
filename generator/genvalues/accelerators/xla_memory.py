"""Memory of one core in bytes for backend xla: what stays resident, and what one micro-batch of a training step adds.

All numbers are for one worker of a tensor-parallel group of ``size``; the number of data-parallel copies affects only
the optimizer's shard. Tests compare weights and LoRA with tensors that are split, LoRA also with checkpoints written by
optimum-neuron 0.4.5, and activations with what autograd saves for a small Llama.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from genvalues.accelerators.architectures import GATE_UP, QUERY_KEY_VALUE, Architecture
from genvalues.accelerators.memory import BF16, FP32, RESERVED, Step, keeps_scores


class XlaMemory(NamedTuple):
    """Bytes on one core; ``hbm`` is the core's capacity."""

    weights: int
    lora: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    working: int
    reserved: int
    hbm: int

    @property
    def total(self) -> int:
        return sum(self[:-1])

    @property
    def summary(self) -> dict[str, int]:
        """The largest parts by name, for a message."""
        return {
            "weights": self.weights,
            "activations": self.activations,
            "logits": self.logits,
            "backward pass of a layer": self.working,
            "reserved": self.reserved,
        }

    @property
    def fits(self) -> bool:
        return self.total <= self.hbm


def xla_memory(architecture: Architecture, step: Step, size: int, copies: int, hbm: int) -> XlaMemory:
    """The memory of a core with ``hbm`` bytes, for ``copies`` groups of ``size`` workers."""
    factors = list(lora_factors(architecture, step.r, step.targets, size))
    return XlaMemory(
        weights=BF16 * weights(architecture, size),
        lora=BF16 * sum(rows * columns for rows, columns in factors),
        gradients=gradient_bytes(factors, copies),
        optimizer=optimizer_bytes(factors, copies),
        activations=activation_bytes(architecture, step, size),
        logits=logit_bytes(architecture, step, size),
        working=working_bytes(architecture, step, size),
        reserved=int(hbm * RESERVED),
        hbm=hbm,
    )


# --- what stays resident


def local_key(architecture: Architecture, size: int) -> int:
    """Features of the key heads on a worker, as many as of the value heads; at least one head.

    optimum-neuron 0.4.5, LlamaAttention: fewer heads than workers are replicated size // kv_heads times
    (kv_size_multiplier).
    """
    return max(1, architecture.kv_heads // size) * architecture.head


def weights(architecture: Architecture, size: int) -> int:
    """Base parameters on a worker.

    NxD's ColumnParallelLinear splits q, k, v, gate and up by outputs, RowParallelLinear o and down by inputs.
    ParallelEmbedding and the output layer are split by the vocabulary (not Granite's). Norms are replicated.
    """
    a, query, key = architecture, architecture.query // size, local_key(architecture, size)
    attention = a.hidden * (query + 2 * key) + query * a.hidden
    mlp = 3 * a.hidden * (a.intermediate // size)
    vocabulary = local_vocabulary(a, size)
    embeddings = vocabulary * a.hidden * (1 if a.tied else 2)
    return embeddings + a.layers * (attention + mlp + a.layer_norm_parameters) + a.hidden


def local_vocabulary(architecture: Architecture, size: int) -> int:
    return architecture.vocabulary // size if architecture.splits_vocabulary else architecture.vocabulary


def lora_factors(architecture: Architecture, r: int, targets: Sequence[str], size: int) -> Iterator[tuple[int, int]]:
    """(rows, columns) of every LoRA factor on a worker.

    A of a layer split by outputs and B of a layer split by inputs are replicated. Layers that optimum-neuron fuses
    share one A: gate and up always, q, k and v where the key-value heads are not divisible by the group's size
    (FusedLinearsSpec and GQAQKVColumnParallelLinearSpec, models/training/transformations_utils.py).
    """
    a, query, key = architecture, architecture.query // size, local_key(architecture, size)
    outputs = {"q_proj": query, "k_proj": key, "v_proj": key}
    outputs |= dict.fromkeys(GATE_UP, a.intermediate // size)
    inputs = {"o_proj": query, "down_proj": a.intermediate // size}
    shared_a = set(GATE_UP[1:]) | (set(QUERY_KEY_VALUE[1:]) if a.kv_heads % size else set())
    for _ in range(a.layers):
        for name in targets:
            if name in inputs:
                yield r, inputs[name]
                yield a.hidden, r
                continue
            if name not in shared_a:
                yield r, a.hidden
            yield outputs[name], r


def gradient_bytes(factors: Sequence[tuple[int, int]], copies: int) -> int:
    """Fp32 gradients accumulated over micro-batches, and the shard that this copy's optimizer updates.

    The frozen base has none. torch-xla's ZeroRedundancyOptimizer with use_grad_acc_hook: main_grad.
    """
    return FP32 * sum(rows * columns + share(rows, copies) * columns for rows, columns in factors)


def optimizer_bytes(factors: Sequence[tuple[int, int]], copies: int) -> int:
    """AdamW's fp32 master weights and two moments, sharded over the copies (ZeRO-1, Rajbhandari et al. 2020, 5.1)."""
    return 3 * FP32 * sum(share(rows, copies) * columns for rows, columns in factors)


def share(rows: int, copies: int) -> int:
    """Rows of a factor that each copy updates, padded to a multiple (torch-xla, _pad_to_world_size)."""
    return -(-rows // copies)


# --- what a micro-batch adds


def layer_bytes(architecture: Architecture, step: Step, size: int) -> float:
    """What one decoder layer keeps for its backward pass, without attention scores.

    Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models", arXiv:2205.05198) count
    34 s b h bytes for a fully trained GPT layer (equation 2 without 5 a s / h), divided by ``size`` with tensor and
    sequence parallelism (equation 4). This is their count for Llama with a frozen base: a frozen layer keeps no input
    (NxD, _linear_autograd_base_setup_fwd), RMSNorm keeps its input in fp32, SwiGLU keeps gate, silu(gate) and up, and
    each LoRA factor A keeps its input and the dropout noise.
    """
    a, tokens = architecture, step.tokens
    query, key, inner = a.query / size, float(local_key(a, size)), a.intermediate / size
    norms = 2 * FP32 * a.hidden / size
    if a.normalizes_heads:
        norms += FP32 * (query + key)
    attention = BF16 * query + 2 * BF16 * key  # query, key and value
    if not keeps_scores(step.attention):
        attention += BF16 * query + FP32 * a.heads / size  # output, and log-sum-exp per row
    mlp = 3 * BF16 * inner
    lora = lora_input_bytes(a, step, size)
    return tokens * (norms + attention + mlp + lora)


def lora_input_bytes(architecture: Architecture, step: Step, size: int) -> float:
    """Bytes per token that the LoRA factors keep: A's input (one per target with dropout, and noise) and output."""
    a = architecture
    width = dict.fromkeys((*QUERY_KEY_VALUE, *GATE_UP), a.hidden / size)
    width |= {"o_proj": a.query / size, "down_proj": a.intermediate / size}
    fused = {"up_proj": "gate_proj"} | ({"k_proj": "q_proj", "v_proj": "q_proj"} if a.kv_heads % size else {})
    inputs = {fused.get(name, name): width[name] for name in step.targets}
    if not step.dropout:  # q, k and v share one input, gate and up another
        of_attention = dict.fromkeys(QUERY_KEY_VALUE, "q_proj") | dict.fromkeys(GATE_UP, "gate_proj")
        inputs = {of_attention.get(name, name): each_width for name, each_width in inputs.items()}
    each = 2 * BF16 if step.dropout else BF16  # torch's dropout noise has the input's type
    # A's output is small and counted whole, with and without sequence parallelism.
    return each * sum(inputs.values()) + BF16 * step.r * len({fused.get(name, name) for name in step.targets})


def score_bytes(architecture: Architecture, step: Step, size: int) -> float:
    """What eager attention keeps of one layer: softmax in fp32 and bf16, and the repeated key and value heads.

    The 5 a s^2 b of Korthikanti et al. (softmax, dropout and its mask, equation 2) with the fp32 softmax of
    optimum-neuron's eager_attention_forward, and without dropout.
    """
    if not keeps_scores(step.attention):
        return 0
    a, tokens = architecture, step.tokens
    scores = (FP32 + BF16) * a.heads / size * step.length
    copied = 2 * BF16 * (a.query / size - local_key(a, size))  # beyond the heads that are kept anyway
    return tokens * (scores + max(0.0, copied))


def activation_bytes(architecture: Architecture, step: Step, size: int) -> int:
    """Everything kept until the backward pass, except the logits.

    none: every layer's tensors. selective: attention scores are recomputed (Korthikanti et al., section 5, equation 6).
    full: each layer keeps only its input, 2 s b h (same section), split by sequence parallelism.
    """
    a, tokens = architecture, step.tokens
    per_layer = layer_bytes(a, step, size)
    if step.checkpointing == "none":
        per_layer += score_bytes(a, step, size)
    elif step.checkpointing == "full":
        per_layer = tokens * BF16 * a.hidden / size
    last_norm = tokens * FP32 * a.hidden / size
    # The additive mask, and which example each token belongs to (trainer, _loss_sum).
    mask = (BF16 + 1) * step.rows * step.length**2 if step.attention != "causal" else 0
    return int(a.layers * per_layer + last_norm + mask)


def logit_bytes(architecture: Architecture, step: Step, size: int) -> int:
    """Logits in bf16 and fp32, and their exponentials in fp32, split by the vocabulary.

    trainer/llama_lora/backends/xla/training.py, _loss_sum, and optimum-neuron's parallel_cross_entropy.
    """
    return (BF16 + 2 * FP32) * step.tokens * local_vocabulary(architecture, size)


def working_bytes(architecture: Architecture, step: Step, size: int) -> int:
    """What one layer's backward pass needs: recomputed tensors, gradients and gathered rows.

    Gradients of scores: of softmax's output in bf16, of its input in fp32 and bf16. Sequence parallelism gathers the
    whole of a layer's input and its gradient (NxD, _gather_along_dim).
    """
    a, tokens = architecture, step.tokens
    recomputed = 0.0
    if step.checkpointing == "selective":
        recomputed = score_bytes(a, step, size)
    elif step.checkpointing == "full":
        recomputed = layer_bytes(a, step, size) + score_bytes(a, step, size)
    of_scores = tokens * (FP32 + 2 * BF16) * a.heads / size * step.length if keeps_scores(step.attention) else 0
    of_mlp = tokens * 3 * BF16 * a.intermediate / size
    gathered = 2 * tokens * BF16 * a.hidden
    return int(recomputed + max(of_scores, of_mlp) + gathered)
