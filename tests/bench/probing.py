"""The probe of 8 rows on a busy machine, where each core has another process that computes, against a quiet one.

The fair share of the cores is then half: twice the quiet time is what the probe need take, and its CPU seconds are the
same. More CPU seconds are those of threads that spin while they wait for others.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from bench.measure import SMALL, Bench, Measured, alternate, call, compared
from bench.models import SMOLLM2, TINY, make_model
from bench.table import Goal, Line, Result

TOKENS = 256


def probe(model: str) -> dict[str, float]:
    """Compute the probe's losses of 8 rows with a model folder; seconds without imports."""
    from llama_lora import environment as environment  # sets the variables that torch reads at import
    from llama_lora.probe import ProbeRecord, recompute
    from llama_lora.streaming import StreamedModel

    ids = [random.Random(row).choices(range(256), k=TOKENS) for row in range(8)]
    rows = [{"input_ids": row, "labels": row, "lengths": [TOKENS]} for row in ids]
    record = ProbeRecord(list(range(8)), TOKENS, [0.0] * 8, [TOKENS - 1] * 8)
    began, cpu_began = time.perf_counter(), time.process_time()
    recompute(record, rows, StreamedModel(Path(model)), isolated=True)
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu_began}


def beside_others(model: Path) -> Measured:
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        return call(probe, model)
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(work: Path) -> dict[str, Result]:
    model = work / "model"
    call(make_model, model, TINY if SMALL else SMOLLM2, "bfloat16", {})
    rounds = alternate(work, {"busy": lambda _: beside_others(model), "quiet": lambda _: call(probe, model)})
    return {
        "probe-cpu": compared(rounds, "cpu", "busy", "quiet"),
        "probe-time": compared(rounds, "seconds", "busy", "quiet", scale=2),
    }


WORK = "probe of 8 rows while other work takes half of the cores' time"
BENCHES = [
    Bench(
        [
            Line("probe-cpu", f"{WORK}: CPU seconds", "s", Goal(1.3), "quiet machine"),
            Line("probe-time", f"{WORK}: time", "s", Goal(1.3), "twice the time of a quiet machine"),
        ],
        measure,
    )
]
