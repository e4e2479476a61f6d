"""Trainium node-hours of an 8B run, counted with the planner's estimates, not measured: the lowest and the highest.

The other side is AWS's example of the same run: aws-samples/awsome-distributed-training, 3.test_cases/pytorch/
optimum-neuron/llama3/kubernetes/fine-tuning. There, the pods that tokenize, compile, train, consolidate and merge each
request all 16 Neuron devices of a node. Here only compile and train do. Assumed: a stage takes as long on either side,
every stage runs once, and no pod waits for another or for a person.
"""

from __future__ import annotations

from pathlib import Path

from bench.measure import ROOT, Bench, Sides, command
from bench.table import Goal, Line

RUN = {"training.maxSteps": 1200, "training.maxSequenceLength": 1024}  # the example's
ON_CPU_NODES = ("tokenize", "consolidate", "merge")


def hours(runs_on: str) -> dict[str, list[float]]:
    """Lowest and highest hours of the stages, by name."""
    settings = {**RUN, "compile.runsOn": runs_on}
    options = [option for key, value in settings.items() for option in ("--set", f"{key}={value}")]
    plan = command("-m", "genvalues.cli", "plan", ROOT / "values/trn1.yaml", "--offline", "--json", *options).told
    costs = plan["estimate"]
    return {"compile": costs["compileHours"], "train": costs["trainHours"], **costs["cpuNodeHours"]}


def measure(work: Path) -> dict[str, Sides]:
    of_example = hours("accelerator")
    theirs = [sum(of_example[stage][end] for stage in ("compile", "train", *ON_CPU_NODES)) for end in (0, 1)]
    found = {}
    for name, runs_on in (("node-hours", "accelerator"), ("node-hours-cpu", "cpu")):
        counted = hours(runs_on)
        found[name] = Sides([counted["compile"][end] + counted["train"][end] for end in (0, 1)], theirs)
    return found


WORK = "Trainium node-hours of a first 8B run of 1,200 steps, counted"
REASON = "compile and train hold the node on both sides, and are most of its hours"
BENCHES = [
    Bench(
        [
            Line("node-hours", WORK, "h", Goal(0.25), "AWS's example", REASON),
            Line("node-hours-cpu", f"{WORK}, with `compile.runsOn: cpu`", "h", Goal(0.25), "AWS's example", REASON),
        ],
        measure,
    )
]
