"""Memory of one core in bytes for backend native: FSDP2, tensor parallelism, activations and the chunked loss.

All numbers are for one worker of ``tensor`` x ``shard``: a tensor-parallel group splits the linear layers of the
decoder, and ``shard`` such workers share one copy of what remains (PyTorch docs, torch.distributed.fsdp.fully_shard).
Further copies of the model change nothing. What autograd keeps is counted for PyTorch's eager operators; torch.compile
can keep less. Tests compare parameters and what autograd keeps with real tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from genvalues.accelerators.architectures import LINEAR, Architecture
from genvalues.accelerators.memory import BF16, FP32, RESERVED, Step

LOSS_CHUNK = 256  # tokens whose logits exist at a time (trainer/llama_lora/backends/native)
ROWWISE = ("o_proj", "down_proj")  # split by their inputs; the other linear layers are split by their outputs
DROPOUT_MASK = 1  # bytes per number: torch's native_dropout keeps a boolean mask
# Shape of a matrix on a worker before FSDP: (rows, columns). FSDP splits rows.
Shape = tuple[int, int]


@dataclass(frozen=True)
class NativeMemory:
    """Bytes on one core; ``hbm`` is the core's capacity."""

    base: int  # frozen weights, bf16, this worker's shard
    adapter: int  # LoRA weights, fp32, sharded too
    gradients: int  # sharded after a step's last micro-batch only (FSDPModule.set_requires_gradient_sync)
    optimizer: int
    root: int  # embedding, last norm and output layer as gathered for the whole step
    layer: int  # one decoder layer as gathered
    activations: int
    loss: int
    working: int  # the backward pass of one layer, beyond what is kept for it
    reserved: int
    hbm: int

    @property
    def gathered(self) -> int:
        """In the backward pass: the root, one layer in use and one gathered in advance."""
        return self.root + 2 * self.layer

    @property
    def peak(self) -> int:
        """The most bytes of tensors at a time.

        It is at the start, where the root is copied from the buffer that it was gathered into; in the backward pass of
        the loss, where the last layer is gathered in advance; or in that of the last layer, with the one before it.
        """
        resident = self.base + self.adapter + self.gradients + self.optimizer + self.root + self.layer
        return resident + max(self.root, self.activations + max(self.loss, self.layer + self.working))

    @property
    def total(self) -> int:
        return self.peak + self.reserved

    @property
    def summary(self) -> dict[str, int]:
        """Parts by name, for a message."""
        return {
            "base weights": self.base,
            "adapter and optimizer": self.adapter + self.gradients + self.optimizer,
            "gathered weights": self.gathered,
            "activations": self.activations,
            "backward pass of the loss or a layer": max(self.loss, self.working),
            "reserved": self.reserved,
        }

    @property
    def fits(self) -> bool:
        return self.total <= self.hbm


def native_memory(
    architecture: Architecture, step: Step, tensor: int, shard: int, hbm: int, accumulates: bool = False
) -> NativeMemory:
    """The memory of a core with ``hbm`` bytes: ``shard`` workers for each of ``tensor`` parts share a copy.

    ``accumulates``: a step has several micro-batches.
    """
    of_layer = list(layer_shapes(architecture, tensor))
    of_root = list(root_shapes(architecture))
    of_lora = list(lora_shapes(architecture, step.r, step.targets, tensor))
    adapter = architecture.layers * FP32 * sharded(of_lora, shard)
    gathers = shard > 1  # else the model is not wrapped
    return NativeMemory(
        base=BF16 * (architecture.layers * sharded(of_layer, shard) + sharded(of_root, shard)),
        adapter=adapter,
        gradients=architecture.layers * FP32 * sharded(of_lora, 1 if accumulates else shard),
        optimizer=2 * adapter,
        root=BF16 * sharded(of_root) if gathers else 0,
        layer=BF16 * sharded(of_layer) + FP32 * sharded(of_lora) if gathers else 0,
        activations=activation_bytes(architecture, step, tensor),
        loss=loss_bytes(architecture, step),
        working=working_bytes(architecture, step, tensor),
        reserved=int(hbm * RESERVED),
        hbm=hbm,
    )


# --- what stays resident


def sharded(shapes: Sequence[Shape], shard: int = 1) -> int:
    """Numbers of these matrices on a worker. FSDP2 pads rows to a multiple of the workers (FSDPParam)."""
    return sum(-(-rows // shard) * columns for rows, columns in shapes)


def linear_shape(architecture: Architecture, name: str, tensor: int) -> Shape:
    """A linear layer's weight on a worker, [out, in]: split by outputs, or by inputs (torch's RowwiseParallel)."""
    inner, outer = architecture.linear(name)
    return (outer, inner // tensor) if name in ROWWISE else (outer // tensor, inner)


def layer_shapes(architecture: Architecture, tensor: int) -> Iterator[Shape]:
    """The frozen weights of a decoder layer on a worker; norms are whole."""
    for name in LINEAR:
        yield linear_shape(architecture, name, tensor)
    yield from [(architecture.hidden, 1)] * 2
    if architecture.normalizes_heads:
        yield from [(architecture.head, 1)] * 2
    if architecture.layer_bias_parameters:
        yield architecture.layer_bias_parameters, 1


def root_shapes(architecture: Architecture) -> Iterator[Shape]:
    """Embedding, output layer and last norm, which tensor parallelism does not split."""
    yield from [(architecture.vocabulary, architecture.hidden)] * (1 if architecture.tied else 2)
    yield architecture.hidden, 1


def lora_shapes(architecture: Architecture, r: int, targets: Sequence[str], tensor: int) -> Iterator[Shape]:
    """A [r, in] and B [out, r] of each target of a decoder layer: the one at the split side is split, the other not."""
    for name in targets:
        outer, inner = linear_shape(architecture, name, tensor)
        yield r, inner
        yield outer, r


# --- what a micro-batch adds


@dataclass(frozen=True)
class LayerActivations:
    """What one decoder layer keeps for its backward pass, in bytes."""

    norms: float  # of the layer's and the MLP's input, in fp32
    attention: float  # of the heads, their LoRA factors, and the scores
    mlp: float

    @property
    def total(self) -> float:
        return self.norms + self.attention + self.mlp


def layer_activations(architecture: Architecture, step: Step, tensor: int) -> LayerActivations:
    """As Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1) count a layer, for Llama with a frozen bf16 base.

    Frozen linear layers keep no input. RMSNorm keeps its input in fp32. SwiGLU keeps gate, silu(gate) and up. There is
    no sequence parallelism: every worker has the whole hidden state.
    """
    a, tokens = architecture, step.tokens
    heads_norms = FP32 * (a.query + a.key) / tensor if a.normalizes_heads else 0
    attention = attention_bytes(a, step, tensor)
    lora = {
        block: sum(lora_bytes(a, step, name, tensor) for name in step.targets if LINEAR[name].block == block)
        for block in ("self_attn", "mlp")
    }
    return LayerActivations(
        norms=tokens * 2 * FP32 * a.hidden,
        attention=tokens * (heads_norms + attention + lora["self_attn"]),
        mlp=tokens * (3 * BF16 * a.intermediate / tensor + lora["mlp"]),
    )


def attention_bytes(architecture: Architecture, step: Step, tensor: int) -> float:
    """Bytes per token that scaled_dot_product_attention keeps.

    causal, the flash kernel (Dao et al. 2022, arXiv:2205.14135, section 3.1): query, key, value and output, and one
    fp32 number per head. isolated, the math path (PyTorch, aten/src/ATen/native/transformers/attention.cpp,
    _scaled_dot_product_attention_math, which computes in fp32): scaled query and key, value, each with as many heads
    as the query, and the softmax of the scores.
    """
    a, query = architecture, architecture.query / tensor
    if step.attention == "causal":
        return BF16 * 2 * (query + a.key / tensor) + FP32 * a.heads / tensor
    return FP32 * 3 * query + score_bytes(a, step, tensor)


def score_bytes(architecture: Architecture, step: Step, tensor: int) -> float:
    """Bytes per token of one matrix of scores in fp32."""
    return FP32 * architecture.heads / tensor * step.length


def lora_bytes(architecture: Architecture, step: Step, name: str, tensor: int) -> float:
    """Bytes per token that a target keeps: PEFT's fp32 copy of the input, the dropout mask, and A's fp32 output.

    PEFT's Linear.forward casts the input for every target anew (_cast_input_dtype), also where q, k and v share it.
    """
    inputs = linear_shape(architecture, name, tensor)[1]
    return (FP32 + (DROPOUT_MASK if step.dropout else 0)) * inputs + FP32 * step.r


def activation_bytes(architecture: Architecture, step: Step, tensor: int) -> int:
    """Everything kept until the backward pass begins.

    none: every layer's tensors. selective: the attention block is recomputed, from its bf16 input. full: the whole
    layer, from its bf16 input.
    """
    a, tokens = architecture, step.tokens
    layer, hidden = layer_activations(a, step, tensor), BF16 * tokens * a.hidden
    kept = {
        "none": layer.total,
        "selective": layer.norms + layer.mlp + hidden,
        "full": hidden,
    }[step.checkpointing]
    last_norm = FP32 * tokens * a.hidden + hidden  # its input in fp32, and its output, from which logits are computed
    mask = step.rows * step.length**2 if step.attention != "causal" else 0
    return int(a.layers * kept + last_norm + mask)


def loss_bytes(architecture: Architecture, step: Step) -> int:
    """One chunk, whose gradient is taken at once: log-probabilities and the gradients of these and of the logits, in
    fp32. The gradient of the hidden state is collected in bf16.
    """
    a = architecture
    return 3 * FP32 * min(LOSS_CHUNK, step.tokens) * a.vocabulary + BF16 * step.tokens * a.hidden


def working_bytes(architecture: Architecture, step: Step, tensor: int) -> int:
    """The backward pass of one layer: what is recomputed, and gradients.

    The MLP comes first: afterwards what it kept is free.
    """
    a, tokens = architecture, step.tokens
    layer = layer_activations(a, step, tensor)
    recomputed = {"none": 0.0, "selective": 0.0, "full": layer.total}[step.checkpointing]
    # The gradients of the hidden state, of the MLP's product and of its two factors.
    of_mlp = recomputed + tokens * BF16 * (a.hidden + 3 * a.intermediate / tensor)
    again = layer.attention if step.checkpointing == "selective" else recomputed
    # The gradients of the softmax and of the scores.
    of_scores = 2 * score_bytes(a, step, tensor) if step.attention != "causal" else 0
    of_attention = again - layer.mlp + tokens * (of_scores + BF16 * (2 * a.hidden + 2 * (a.query + a.key) / tensor))
    return int(max(of_mlp, of_attention))
