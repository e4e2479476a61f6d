"""What a trace of the engine found: one worker's step of a run on a device that computes nothing (backend native)."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from genvalues.accelerators.native_memory import NativeMemory

# The parts that the trace measures by itself, and the most at a time. What the trace has of a layer's backward pass is
# in the peak only.
PARTS = ("base", "adapter", "gradients", "optimizer", "gathered", "activations", "loss", "peak")


class Trace(NamedTuple):
    """``bytes`` on one core by part (``PARTS``); ``graphs`` that are compiled; ``problems`` that end a run."""

    world: int
    bytes: dict[str, int]
    operators: tuple[str, ...]
    graphs: int
    seconds: float
    problems: tuple[str, ...]


class InvalidTrace(ValueError):
    """The output is not that of a tracer."""


def parse(output: str) -> Trace:
    """Read the last line of the tracer's output, a JSON object. Raises InvalidTrace."""
    lines = output.strip().splitlines()
    try:
        found: dict[str, Any] = json.loads(lines[-1])
        return Trace(
            world=int(found["world"]),
            bytes={part: int(found["bytes"][part]) for part in PARTS},
            operators=tuple(map(str, found["operators"])),
            graphs=int(found["graphs"]),
            seconds=float(found["seconds"]),
            problems=tuple(map(str, found["problems"])),
        )
    except (IndexError, ValueError, KeyError, TypeError) as error:
        raise InvalidTrace(f"{type(error).__name__}: {error}") from None


class Comparison(NamedTuple):
    part: str
    computed: int
    traced: int

    @property
    def difference(self) -> float | None:
        """Of the computed bytes from the traced ones; None where there are none."""
        return self.computed / self.traced - 1 if self.traced else None


def compare(computed: NativeMemory, traced: Trace) -> list[Comparison]:
    return [Comparison(part, getattr(computed, part), traced.bytes[part]) for part in PARTS]
