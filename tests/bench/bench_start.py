"""Starting genvalues against starting Python: what a user waits for, as ratios of one run.

All sides by turns, a process each, the modules compiled before; the medians are printed. Promised: at most 8 times.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 15
AT_MOST = 8.0
ROOT = Path(__file__).parents[2]
GENVALUES = str(Path(sys.executable).with_name("genvalues"))
INPUTS = str(ROOT / "values/trn1.yaml")
PASS = "python -c pass"
COMMANDS = {
    PASS: [sys.executable, "-c", "pass"],
    "genvalues --help": [GENVALUES, "--help"],
    "genvalues check": [GENVALUES, "check", INPUTS],
    "genvalues write": [GENVALUES, "write", INPUTS, "-o", "-"],
}


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, cwd=ROOT)
    return time.perf_counter() - began


def main() -> int:
    for command in COMMANDS.values():
        seconds(command)
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            taken[name].append(seconds(command))
    medians = {name: statistics.median(times) for name, times in taken.items()}
    ratios = {name: median / medians[PASS] for name, median in medians.items() if name != PASS}
    print(f"{PASS}: {medians[PASS] * 1000:.0f} ms")
    for name, ratio in ratios.items():
        print(f"{name}: {medians[name] * 1000:.0f} ms, ratio {ratio:.1f}")
    return 1 if max(ratios.values()) > AT_MOST else 0


if __name__ == "__main__":
    sys.exit(main())
