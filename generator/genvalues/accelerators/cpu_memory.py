"""Memory of the stages that compute with the model on a CPU node: consolidate, merge and evaluate.

They read one decoder layer at a time (trainer/llama_lora/streaming.py), so they need less than the model. Only the
sample answers of evaluate need all of it, because each token reads every weight. Bytes, for weights in bf16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from genvalues.accelerators.architectures import LINEAR, Architecture, from_config, table
from genvalues.accelerators.memory import BF16, FP32

GIB = 1 << 30
# Python with torch, transformers, peft and datasets: 0.8 GiB measured with torch 2.15, transformers 5.24 and peft 0.21.
PROCESS = 5 * GIB // 4
HIDDEN_STATES = GIB  # of the rows that pass through the layers together; more rows take another pass
LOGITS = GIB // 4  # of the positions whose logits exist at a time, with their copies in fp32
BATCH_TOKENS = 2048  # of the held-out rows that a layer computes at once, padding included
SAMPLE_TOKENS = 4096  # prompts and answers that are generated together, padding included
GENERATION = 2 * GIB  # keys, values and activations of these: 0.9 GiB for Llama 3.1 8B, 2.3 GiB for 70B, by count
MARGIN = 1.15  # for what is not counted: allocator, page tables
MOST_RESIDENT = 40 * GIB  # a stage that would need more to generate answers leaves them out


class Memory(NamedTuple):
    """Whole GiB of memory: what a pod requests, and its limit. Up to the limit the kernel caches files."""

    request: int
    limit: int

    @classmethod
    def of(cls, size: float) -> Memory:
        """For this many bytes, and half of it more for cached files."""
        request = math.ceil(size * MARGIN / GIB)
        return cls(request, math.ceil(1.5 * request))

    def quantities(self) -> dict[str, str]:
        """As Kubernetes writes them."""
        return {"requests": f"{self.request}Gi", "limits": f"{self.limit}Gi"}


# Of a model that the chart does not know: requests for a small one, and limits within which one of 70B is verified too,
# if the node has the memory.
UNKNOWN_MODEL = {"consolidate": Memory(2, 12), "merge": Memory(2, 12), "evaluate": Memory(2, 16)}


def streamed(architecture: Architecture, length: int = BATCH_TOKENS) -> int:
    """The loss of rows of ``length`` tokens: the embedding, a decoder layer, and the output layer are read in turn."""
    a, tokens = architecture, max(length, BATCH_TOKENS)
    embedding = BF16 * a.vocabulary * a.hidden
    layer = BF16 * (a.layer_linear_parameters + a.layer_norm_parameters + a.layer_bias_parameters)
    # One linear layer's weight as the matrix library packs it, and the activations of the attention and the MLP.
    working = BF16 * largest_linear(a) + BF16 * tokens * (4 * a.intermediate + 8 * a.hidden)
    return PROCESS + HIDDEN_STATES + max(layer + working, embedding + LOGITS)


def merge(architecture: Architecture) -> int:
    """The merge of one tensor: stored in bf16, with its delta twice in fp32, and a check that the sum is finite."""
    return PROCESS + largest_linear(architecture) * (2 * FP32 + 2 * BF16 + 1)


def resident(architecture: Architecture) -> int:
    """The whole model, to generate answers."""
    return PROCESS + BF16 * architecture.parameters + GENERATION


def largest_linear(architecture: Architecture) -> int:
    """Parameters of the largest linear layer of a decoder layer."""
    return max(inner * outer for inner, outer in map(architecture.linear, LINEAR))


def stage_memory(
    architecture: Architecture | None,
    r: int,
    targets: Sequence[str],
    length: int = BATCH_TOKENS,
    *,
    verifies: bool = True,
    samples: bool = True,
) -> dict[str, Memory]:
    """The memory of each of the three stages, for an adapter of rank ``r``.

    ``architecture`` None: unknown, then as for the largest model of the table. ``verifies``: consolidate and merge
    compute the probe. ``samples``: evaluate generates answers, if the model is not too large.
    """
    a = architecture or max((from_config(row["config"]) for row in table().values()), key=lambda each: each.parameters)
    adapter = FP32 * a.lora_parameters(r, targets)
    check = streamed(a, length) + adapter if verifies else PROCESS + adapter
    evaluate = streamed(a, length)
    if samples:
        whole = resident(a) if architecture else MOST_RESIDENT
        evaluate = max(evaluate, whole) if whole <= MOST_RESIDENT else evaluate
    return {
        "consolidate": Memory.of(check),
        "merge": Memory.of(max(check, merge(a) + adapter)),
        "evaluate": Memory.of(evaluate),
    }
