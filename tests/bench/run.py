"""`make bench`: measure, print each line, and write all results into tests/bench/results.json and docs/benchmarks.md.

    make bench LINE=...     only lines whose name starts with it: merge, tokenize-growth, ...

SMALL=1 tries every line with small inputs and one round, and writes nothing.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from bench import clusters, consolidating, merging, node_hours, preparing, probing, starting, training
from bench.measure import ROOT, SMALL, run
from bench.table import Result, markdown, text, with_table
from genvalues.common import files

PAGE, RESULTS = ROOT / "docs/benchmarks.md", Path(__file__).with_name("results.json")
MODULES = (preparing, training, consolidating, merging, probing, starting, clusters, node_hours)
BENCHES = [bench for module in MODULES for bench in module.BENCHES]


def main(*wanted: str) -> int:
    results = {name: Result(**each) for name, each in json.loads(RESULTS.read_text(encoding="utf-8")).items()}
    lines = [line for bench in BENCHES for line in bench.lines]
    if unknown := [word for word in wanted if not any(line.name.startswith(word) for line in lines)]:
        print(f"no line starts with {unknown[0]}. Lines: {', '.join(line.name for line in lines)}", file=sys.stderr)
        return 2
    for bench in BENCHES:
        if wanted and not any(line.name.startswith(wanted) for line in bench.lines):
            continue
        if lacking := bench.lacking:
            print(*(f"{line.name}: not measured: {lacking}" for line in bench.lines), sep="\n", flush=True)
            continue
        began = time.monotonic()
        found = run(bench)
        print(*(text(line, found[line.name]) for line in bench.lines), sep="\n")
        print(f"({time.monotonic() - began:.0f} s)", flush=True)
        results |= found
        if not SMALL:
            files.write_json(RESULTS, {line.name: asdict(results[line.name]) for line in lines if line.name in results})
            files.write_text(PAGE, with_table(PAGE.read_text(encoding="utf-8"), markdown(lines, results)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
