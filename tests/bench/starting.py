"""The start of commands, and stages with nothing to do, against `python -c pass`."""

from __future__ import annotations

from pathlib import Path

import run_demo

from bench.measure import NEWEST, ROOT, SMALL, Bench, Measured, alternate, call, command, compared
from bench.table import Goal, Line, Result

PASS = "python -c pass"
AT_MOST = Goal(15)
STARTS = 1 if SMALL else 9  # of each command: they are short
INPUTS = str(ROOT / "values/trn1.yaml")
COMMANDS = {
    "start-genvalues": ["genvalues.cli", "--help"],
    "start-check": ["genvalues.cli", "check", INPUTS],
    "start-plan": ["genvalues.cli", "plan", INPUTS, "--offline"],
    "start-write": ["genvalues.cli", "write", INPUTS, "-o", "-"],
    "start-llama-lora": ["llama_lora.cli", "--help"],
}
STAGES = ("tokenize", "compile", "train", "consolidate", "merge", "evaluate")


REASON = "jsonschema and pydantic are imported, and the inputs' schema is walked"
SKIPPED = "most of it is before the first stage: genvalues checks the inputs, and Helm renders the chart"


def make_inputs(folder: str) -> None:
    """Write a tiny model, and rows for the demo's inputs file."""
    from trainer.conftest import make_model, write_rows

    make_model(Path(folder) / "model", dtype="bfloat16")
    rows = write_rows(Path(folder) / "rows.jsonl")
    rows.write_text(rows.read_text().replace('"q":', '"question":').replace('"a":', '"answer":'))


def local(folder: Path) -> Measured:
    """Run the demo's pipeline on the tiny model, or find that nothing changed."""
    settings: dict[str, object] = {
        **{"model.path": folder / "model", "dataset.source": folder / "rows.jsonl", "dataset.evalFraction": 0.1},
        **{"training.maxSteps": 2, "training.maxSequenceLength": 128},
        **{"evaluation.maxRows": 4, "evaluation.maxNewTokens": 4},
    }
    return command(*run_demo.local_command(run_demo.HERE / "finetune.yaml", settings, folder / "workspace"))


def python_pass(_: Path) -> Measured:
    return command(NEWEST.python, "-c", "pass")


def measure_starts(work: Path) -> dict[str, Result]:
    sides = {name: lambda _, given=given: command("-m", *given) for name, given in COMMANDS.items()}
    rounds = alternate(work, {**sides, PASS: python_pass}, STARTS)
    return {name: compared(rounds, "wall", name, PASS) for name in COMMANDS}


def measure_skipping(work: Path) -> dict[str, Result]:
    call(make_inputs, work)
    local(work)
    config = next(work.rglob("run.yaml"))
    stage = ("-m", "llama_lora.cli", "tokenize", "--config", config, "--workspace", work / "workspace")
    rounds = alternate(work, {"local": lambda _: local(work), "stage": lambda _: command(*stage), PASS: python_pass})
    seconds = [each["wall"] / len(STAGES) for each in rounds["local"]]
    return {"start-stage": compared(rounds, "wall", "stage", PASS), "start-local": Result(seconds)}


BENCHES = [
    Bench(
        [
            Line("start-genvalues", "`genvalues --help`", "s", AT_MOST, PASS),
            Line("start-check", "`genvalues check`", "s", AT_MOST, PASS, REASON),
            Line("start-plan", "`genvalues plan --offline`", "s", AT_MOST, PASS, REASON),
            Line("start-write", "`genvalues write`", "s", AT_MOST, PASS, REASON),
            Line("start-llama-lora", "`llama-lora --help`", "s", AT_MOST, PASS),
        ],
        measure_starts,
    ),
    Bench(
        [
            Line("start-stage", "`llama-lora tokenize` with nothing to do", "s", AT_MOST, PASS),
            Line(
                "start-local",
                "`genvalues local` with nothing to do: time a stage",
                "s",
                Goal(0.3),
                reason=SKIPPED,
                of_ours=True,
            ),
        ],
        measure_skipping,
    ),
]
