"""What the memory of a core depends on, whatever the backend: the settings of a step, and what is not a tensor."""

from __future__ import annotations

from typing import NamedTuple

BF16, FP32 = 2, 4  # bytes per number
# Share of a core's memory for everything that is not a tensor: compiled code, the runtime's micro-code (96 MB per
# physical core), DMA rings, collectives' buffers and compiler spills (Neuron docs, Neuron Device Memory). It cannot be
# computed in advance; an eighth is an assumption.
RESERVED = 1 / 8


def keeps_scores(attention: str) -> bool:
    """Whether a kind of training.attention computes a matrix of scores. The others run in a flash kernel."""
    return attention == "isolated"


class Step(NamedTuple):
    """The settings that affect memory. ``rows`` of ``length`` tokens are one copy's micro-batch."""

    length: int
    rows: int
    attention: str  # isolated, causal or isolatedFlash
    checkpointing: str  # none, selective or full
    r: int
    targets: tuple[str, ...]
    dropout: bool

    @property
    def tokens(self) -> int:
        return self.length * self.rows
