"""The verdicts of `llama-lora acceptance`: from what was measured to PASS, FAIL or SKIP. No files, no processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from genvalues.accelerators.native_memory import NativeMemory
from llama_lora.config import Parallelism
from llama_lora.probe import ProbeRecord

# Two computations in bf16 with sums in another order. A mean loss over thousands of tokens, whose roundings are
# independent, stays within one rounding of a bf16 number (8 bits: 2^-8). A gradient has passed about 14 roundings in
# each layer, which add up as the root of their number: sqrt(14 x 16 layers) x 2^-9 is 3 %. A worker whose part of the
# gradient is left out or counted twice changes the norm by more than 5 %.
LOSS_TOLERANCE = 2**-8  # relative
NORM_TOLERANCE = 0.05  # relative
MEMORY_TOLERANCE = 0.10  # the closed formula is within 5 % of a trace; the allocator rounds each tensor up

Verdict = Literal["PASS", "FAIL", "SKIP"]
Step = Mapping[str, Any]  # a line of metrics.jsonl (runlog.StepMetrics), or of the measurements


@dataclass(frozen=True)
class Check:
    """One check: what was found, and what is expected."""

    name: str
    verdict: Verdict
    found: str
    expected: str

    def __str__(self) -> str:
        expected = f" (expected: {self.expected})" if self.expected else ""
        return f"{self.verdict}  {self.name}: {self.found}{expected}"


def verdict(name: str, passed: bool, found: str, expected: str) -> Check:
    return Check(name, "PASS" if passed else "FAIL", found, expected)


def skipped(name: str, reason: str) -> Check:
    return Check(name, "SKIP", reason, "")


def passed(found: Sequence[Check]) -> bool:
    return all(check.verdict != "FAIL" for check in found)


def falling_loss(steps: Sequence[Step], count: int) -> Check:
    """The steps train on the same rows, so their loss must fall."""
    losses = [step["loss"] for step in steps]
    passed = len(losses) == count > 1 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    found = f"{len(losses)} steps, {' '.join(f'{loss:.4f}' for loss in losses)}"
    return verdict("loss", passed, found, f"{count} steps, finite, the last below the first")


def full_length_probe(measured: ProbeRecord, recomputed: ProbeRecord, tolerance: float) -> Check:
    """The probe's loss in nats per trained token, on the device and with transformers and PEFT on the CPU."""
    rows = f"{len(measured.rows)} rows of up to {measured.max_tokens} tokens"
    found = f"{measured.loss:.5f} and {recomputed.loss:.5f} on {rows}"
    expected = f"equal within {tolerance:g} nats on the device and with transformers on the CPU"
    return verdict("probe", abs(measured.loss - recomputed.loss) <= tolerance, found, expected)


def first_step(device: Step, cpu: Step) -> Check:
    """Loss and gradient norm of the first step, on the device and on the CPU."""

    def difference(key: str) -> float:
        return float(abs(device[key] / cpu[key] - 1))

    loss, norm = difference("loss"), difference("grad_norm")
    found = (
        f"loss {device['loss']:.5f} and {cpu['loss']:.5f} ({loss:.2%} apart), "
        f"gradient norm {device['grad_norm']:.4g} and {cpu['grad_norm']:.4g} ({norm:.2%})"
    )
    expected = f"as on the CPU, loss within {LOSS_TOLERANCE:.2%}, norm within {NORM_TOLERANCE:.0%}: both round to bf16"
    same_rows = device["trained_tokens"] == cpu["trained_tokens"]
    return verdict("first step", same_rows and loss <= LOSS_TOLERANCE and norm <= NORM_TOLERANCE, found, expected)


def no_fallbacks(device: str, measured: Sequence[Step]) -> Check:
    """The operators that ran on the CPU after the first step of any process."""
    if device != "neuron":
        return skipped("fallbacks", f"the device {device} has no fallback to the CPU")
    operators = sorted({name for step in measured if not step["first"] for name in step["fallbacks"]})
    return verdict("fallbacks", not operators, ", ".join(operators) or "none", "none after the first step")


def compiled_once(device: str, measured: Sequence[Step]) -> Check:
    """The number of files in the cache after each step of each process."""
    if device != "neuron":
        return skipped("compiled files", f"the device {device} compiles no files")
    counts = [step["cached"] for step in measured] or [0]
    found = f"{counts[0]} after step 1, then {', '.join(str(count) for count in sorted(set(counts[1:])))}"
    expected = "more than 0 after step 1, and the same number later, after a save, the probe and a resume"
    return verdict("compiled files", counts[0] > 0 and set(counts) == {counts[0]}, found, expected)


def equal_resume(
    whole: Sequence[Step],
    resumed: Sequence[Step],
    digests: tuple[Mapping[str, str], Mapping[str, str]],
    first: int,
    expected_first: int,
) -> Check:
    """A training that was killed and resumed at step ``first``, against one that was not.

    ``digests`` has the SHA-256 of each tensor in the last checkpoint of both.
    """

    def after(steps: Sequence[Step]) -> list[Any]:
        return [[step[key] for key in ("step", "loss", "grad_norm")] for step in steps if step["step"] >= first]

    one, other = digests
    differing = sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
    same_steps = bool(after(whole)) and after(whole) == after(resumed)
    found = f"resumed at step {first}, {len(differing)} of {len(one)} tensors differ"
    if differing:
        found += f" ({', '.join(differing[:3])}{', ...' if len(differing) > 3 else ''})"
    if not same_steps:
        found += "; the losses or gradient norms differ"
    expected = f"resumed at step {expected_first} after a kill, every loss, norm and tensor equal to the bit"
    return verdict("resume", first == expected_first and same_steps and bool(one) and not differing, found, expected)


def all_nodes(measured: Sequence[Step], layout: Parallelism) -> Check:
    """The nodes and workers that took part."""
    if layout.nodes == 1:
        return skipped("nodes", "the run has one node")

    def counts(nodes: int, workers: int) -> str:
        return f"{nodes} nodes, {workers} workers"

    found = counts(len({step["node"] for step in measured}), len({step["worker"] for step in measured}))
    expected = counts(layout.nodes, layout.nodes * layout.processes_per_node)
    return verdict("nodes", found == expected, found, expected)


def planned_memory(device: str, allocated: int, planned: NativeMemory) -> Check:
    """The largest worker's peak of allocated bytes, against the plan.

    Less than the base weights cannot be: then the device does not count.
    """
    if device == "cpu":
        return skipped("memory", "the device cpu has no memory of its own")
    most = round(planned.peak * (1 + MEMORY_TOLERANCE))
    if device == "neuron":
        most = min(most, planned.hbm)
    base, limit, peak = (f"{size / 2**30:.2f}" for size in (planned.base, most, planned.peak))
    expected = f"planned {peak} GiB: at least the base weights, {base} GiB, at most {limit} GiB"
    return verdict("memory", planned.base <= allocated <= most, f"{allocated / 2**30:.2f} GiB", expected)
