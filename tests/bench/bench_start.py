"""Start-up time of genvalues, compared to `python -c pass` in the same run.

Each command is a process of its own, in turns, with compiled modules; the medians are printed. A command that makes no
network call takes at most AT_MOST times as long as Python alone, and at most MOST_SECONDS on an idle core.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 15
AT_MOST = 15.0
MOST_SECONDS = 0.8
ROOT = Path(__file__).parents[2]
GENVALUES = str(Path(sys.executable).with_name("genvalues"))
INPUTS = str(ROOT / "values/trn1.yaml")
PASS = "python -c pass"
COMMANDS = {
    PASS: [sys.executable, "-c", "pass"],
    "genvalues --help": [GENVALUES, "--help"],
    "genvalues check": [GENVALUES, "check", INPUTS],
    "genvalues plan": [GENVALUES, "plan", INPUTS, "--offline"],
    "genvalues write": [GENVALUES, "write", INPUTS, "-o", "-"],
}


def seconds(command: list[str]) -> float:
    """Run a command; return how long it took."""
    began = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, cwd=ROOT)
    return time.perf_counter() - began


def main() -> int:
    for command in COMMANDS.values():
        seconds(command)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    medians = {name: statistics.median(all_times) for name, all_times in times.items()}
    reference = medians.pop(PASS)
    print(f"{PASS}: {reference * 1000:.0f} ms")
    for name, median in medians.items():
        print(f"{name}: {median * 1000:.0f} ms, {median / reference:.1f} times")
    slowest = max(medians.values())
    if slowest > MOST_SECONDS:
        print(f"over {MOST_SECONDS} s: slower than promised, unless this computer is busy")
    return 1 if slowest > AT_MOST * reference else 0


if __name__ == "__main__":
    sys.exit(main())
