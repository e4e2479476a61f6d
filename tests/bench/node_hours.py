"""Trainium node-hours of an 8B run, counted with the planner's estimates, not measured: the lowest and the highest.

The other side is AWS's example of the same run: aws-samples/awsome-distributed-training, 3.test_cases/pytorch/
optimum-neuron/llama3/kubernetes/fine-tuning. There, the pods that tokenize, compile, train, consolidate and merge each
request all 16 Neuron devices of a node. Here only compile and train do. Assumed: a stage takes as long on either side,
every stage runs once, and no pod waits for another or for a person.
"""

from __future__ import annotations

from pathlib import Path

from bench.measure import ROOT, Bench, command
from bench.table import Goal, Line, Result

STEPS, LENGTH = 1200, 1024  # the example's


def hours(runs_on: str, *stages: str) -> list[float]:
    """The lowest and the highest sum of the hours of stages."""
    run = {"training.maxSteps": STEPS, "training.maxSequenceLength": LENGTH, "compile.runsOn": runs_on}
    options = [option for key, value in run.items() for option in ("--set", f"{key}={value}")]
    costs = command("-m", "genvalues.cli", "plan", ROOT / "values/trn1.yaml", "--offline", "--json", *options)[
        "estimate"
    ]
    by_stage = {"compile": costs["compileHours"], "train": costs["trainHours"], **costs["cpuNodeHours"]}
    return [sum(by_stage[stage][end] for stage in stages) for end in (0, 1)]


def measure(work: Path) -> dict[str, Result]:
    example = hours("accelerator", "tokenize", "compile", "train", "consolidate", "merge")
    runs_on = {"node-hours": "accelerator", "node-hours-cpu": "cpu"}
    return {name: Result(hours(where, "compile", "train"), example) for name, where in runs_on.items()}


WORK = f"Trainium node-hours of a first 8B run of {STEPS:,} steps, counted"
EXAMPLE = "AWS's example"
REASON = "compile and train hold the node on both sides, and are most of its hours"
BENCHES = [
    Bench(
        [
            Line("node-hours", WORK, "h", Goal(0.25), EXAMPLE, REASON),
            Line("node-hours-cpu", f"{WORK}, with `compile.runsOn: cpu`", "h", Goal(0.25), EXAMPLE, REASON),
        ],
        measure,
    )
]
