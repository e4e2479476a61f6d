"""Whether one run needs a graph that another has not made, by the texts that XLA dumps.

How to use it, on the CPU shim or wherever torch-xla runs (docs/neuron.md says how to start workers there): run the
workers of compile and of train, or of any two runs, each with its own

    XLA_FLAGS="--xla_dump_to=FOLDER --xla_dump_hlo_as_text"

and compare: ``graph_set(train) - graph_set(compile)`` must be empty, and must not be when maxSequenceLength differs.
Only what is before XLA's own optimizations counts: that is what Trainium's compiler gets, and what its cache is keyed
by. On the CPU the graphs are not those of a Trainium (its custom calls are missing), but what two runs do differently
shows there as well.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

# What differs between two dumps of one graph: the module's name, where in the source an instruction comes from, and the
# numbers behind the names of instructions and computations (add.12, region_0.7), which count from the process's start.
MODULE_NAME = re.compile(r"^HloModule [^\s,]+", re.MULTILINE)
METADATA = re.compile(r""",? metadata=\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\}""")
NUMBERED = re.compile(r"(?<![\w.\"])(%?[A-Za-z_][\w-]*)(?:\.\d+)+(?![\w.])")


def graph_set(dump_folder: Path) -> set[str]:
    """The hash of every graph that was dumped into a folder, by all workers of a run.

    Raises ValueError where there is none: then XLA_FLAGS did not reach the workers, and any comparison would hold.
    """
    graphs = {
        hashlib.sha256(canonical(file.read_text(encoding="utf-8")).encode()).hexdigest()
        for file in dump_folder.rglob("*before_optimizations.txt")
    }
    if not graphs:
        raise ValueError(f"{dump_folder} has no graph: was XLA_FLAGS set for the workers?")
    return graphs


def canonical(hlo: str) -> str:
    """The text of a graph without what differs from one dump to the next. Shapes, constants and the order stay."""
    return NUMBERED.sub(r"\1", METADATA.sub("", MODULE_NAME.sub("HloModule", hlo))).strip()
