"""`make test-faults`: run every case of the table, print it, and write it with its date and seed to
docs/reliability.md. A failed case is a red row, and the command ends with 1.

    python tests/faults/run.py [--seed SEED] [WORDS]    # only cases with these words; the page is not written then
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
import traceback
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "demo")]

import conftest as _settings  # noqa: E402, F401 - one thread for each process
from faults.table import CLUSTER, FAULTS, Fault, World, chance_of  # noqa: E402
from trainer.test_full_volume import can_mount  # noqa: E402

PAGE = HERE.parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- make test-faults writes from here -->", "<!-- to here -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="?", default="")
    parser.add_argument("--seed", default=date.today().isoformat())
    asked = parser.parse_args()
    began = time.monotonic()
    failures: dict[str, list[str]] = {}
    done: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        _ = world.undisturbed
        for fault in FAULTS:
            run_fault(fault, world, asked.seed, asked.words, done, failures)
    table = "\n".join(rows(done, failures, asked.seed, time.monotonic() - began))
    print(table)
    if not asked.words:
        write_page(table)
        print(f"written to {PAGE}")
    return 1 if any(failures.values()) else 0


def run_fault(
    fault: Fault, world: World, seed: str, words: str, done: dict[str, int], failures: dict[str, list[str]]
) -> None:
    for name, work in fault.cases:
        if words and words not in f"{fault.name}: {name}":
            continue
        began = time.monotonic()
        done[fault.name] = done.get(fault.name, 0) + 1
        try:
            work(world, chance_of(seed, fault, name))
            told = "ok"
        except Exception as error:
            told = f"FAILED: {error}" if isinstance(error, AssertionError) else traceback.format_exc()
            failures.setdefault(fault.name, []).append(name)
        print(f"{fault.name}: {name}: {told} ({time.monotonic() - began:.0f} s)", flush=True)


def rows(done: dict[str, int], failures: dict[str, list[str]], seed: str, seconds: float) -> list[str]:
    """The table in Markdown."""
    total, failed = sum(done.values()), sum(map(len, failures.values()))
    volumes = "a tmpfs" if can_mount() else "a limit of the size of a file, as no volume could be mounted"
    lines = [
        f"{date.today().isoformat()}, seed `{seed}`: {total} cases in {seconds / 60:.0f} minutes, {failed} failed. "
        f"Full volumes were {volumes}.",
        "",
        "| fault | what happens | what to do | cases | failed |",
        "|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        if fault.name in done:
            red = f"**{', '.join(failures[fault.name])}**" if fault.name in failures else "0"
            lines.append(f"| {fault.name} | {fault.happens} | {fault.do} | {done[fault.name]} | {red} |")
    lines += [
        "",
        "In a cluster (`make test-cluster`, which is not part of this run):",
        "",
        "| fault | what happens | test |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {happens} | `tests/cluster/{file}`, {words.replace('_', ' ')} |"
        for name, happens, file, words in CLUSTER
    ]
    return lines


def write_page(table: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    page = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{table}\n\n{END}", page, flags=re.DOTALL)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
