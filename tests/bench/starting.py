"""The start of commands, and stages with nothing to do, against `python -c pass`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

from bench.measure import NEWEST, ROOT, ROUNDS, Bench, Measured, Sides, alternate, call, command, serve, wall
from bench.table import Goal, Line

PASS = "python -c pass"
AT_MOST = Goal(15)
INPUTS = str(ROOT / "values/trn1.yaml")
COMMANDS = {
    "genvalues --help": ["genvalues.cli", "--help"],
    "genvalues check": ["genvalues.cli", "check", INPUTS],
    "genvalues plan": ["genvalues.cli", "plan", INPUTS, "--offline"],
    "genvalues write": ["genvalues.cli", "write", INPUTS, "-o", "-"],
    "llama-lora --help": ["llama_lora.cli", "--help"],
}
STAGES = ("tokenize", "rehearse", "compile", "train", "consolidate", "merge", "evaluate")


def make_inputs(folder: str) -> None:
    """Write a tiny model, and rows for the demo's inputs file."""
    from trainer.conftest import make_model, write_rows

    make_model(Path(folder) / "model", dtype="bfloat16")
    rows = write_rows(Path(folder) / "rows.jsonl")
    rows.write_text(rows.read_text().replace('"q":', '"question":').replace('"a":', '"answer":'))


def local(folder: Path) -> Measured:
    settings: dict[str, object] = {
        "model.path": folder / "model",
        "dataset.source": folder / "rows.jsonl",
        "dataset.evalFraction": 0.1,
        "training.maxSteps": 2,
        "training.maxSequenceLength": 128,
        "evaluation.maxRows": 4,
        "evaluation.maxNewTokens": 4,
    }
    options = [option for key, value in settings.items() for option in ("--set", f"{key}={value}")]
    inputs = ROOT / "tests/demo/finetune.yaml"
    return command("-m", "genvalues.cli", "--quiet", "local", inputs, "--workspace", folder / "workspace", *options)


def measure_start(work: Path) -> dict[str, Sides]:
    sides = {name: lambda _, run=run: command("-m", *run) for name, run in COMMANDS.items()}
    sides[PASS] = lambda _: command(NEWEST.python(), "-c", "pass")
    alternate(work, sides, rounds=1)  # compiles the modules
    rounds = alternate(work, sides, rounds=3 * ROUNDS)
    return {line_name(name): compared(rounds, wall, name, PASS) for name in COMMANDS}


def measure_skipping(work: Path) -> dict[str, Sides]:
    call("bench.starting", "make_inputs", work)
    local(work)
    [config] = (work / "workspace").rglob("run.yaml")
    stage = ["llama_lora.cli", "tokenize", "--config", config, "--workspace", work / "workspace"]
    sides = {
        "local": lambda _: local(work),
        "stage": lambda _: command("-m", *stage),
        PASS: lambda _: command(NEWEST.python(), "-c", "pass"),
    }
    rounds = alternate(work, sides)
    return {
        "start-stage": compared(rounds, wall, "stage", PASS),
        "start-local": compared(rounds, lambda each: each.seconds / len(STAGES), "local"),
    }


def line_name(command_line: str) -> str:
    """start-check of `genvalues check`."""
    return f"start-{command_line.replace(' --help', '').removeprefix('genvalues ')}"


BENCHES = [
    Bench([Line(line_name(name), f"`{name}`", "s", AT_MOST, PASS) for name in COMMANDS], measure_start),
    Bench(
        [
            Line("start-stage", "`llama-lora tokenize` that has nothing to do", "s", AT_MOST, PASS),
            Line("start-local", "a stage of `genvalues local` that has nothing to do", "s", Goal(0.3), of_ours=True),
        ],
        measure_skipping,
    ),
]

if __name__ == "__main__":
    serve(globals())
