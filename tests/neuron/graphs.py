"""Compare the XLA graphs of two runs by XLA's text dumps.

Run the workers of compile and of train, or of any two runs, wherever torch-xla runs (docs/neuron-xla.md), with separate

    XLA_FLAGS="--xla_dump_to=FOLDER --xla_dump_hlo_as_text"

and compare them: ``graph_set(train) - graph_set(compile)`` must be empty, and must not be empty if maxSequenceLength
differs. Only graphs before XLA's optimizations are compared: Trainium's compiler gets these, and its cache keys depend
on them. On the CPU the graphs differ from Trainium's (no custom calls), but differences between runs show there too.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

# What differs between two dumps of the same graph: the module's name, source locations, and the numbers in the names of
# instructions and computations (add.12, region_0.7), which count from the start of the process.
MODULE_NAME = re.compile(r"^HloModule [^\s,]+", re.MULTILINE)
METADATA = re.compile(r""",? metadata=\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\}""")
NUMBERED = re.compile(r"(?<![\w.\"])(%?[A-Za-z_][\w-]*)(?:\.\d+)+(?![\w.])")


def graph_set(dump_folder: Path) -> set[str]:
    """The hashes of all graphs in a dump folder, of all workers of a run.

    Raises ValueError if there are none: then the workers did not get XLA_FLAGS, and every comparison would succeed.
    """
    graphs = {
        hashlib.sha256(canonical(file.read_text(encoding="utf-8")).encode()).hexdigest()
        for file in dump_folder.rglob("*before_optimizations.txt")
    }
    if not graphs:
        raise ValueError(f"{dump_folder} has no graph: was XLA_FLAGS set for the workers?")
    return graphs


def canonical(hlo: str) -> str:
    """Remove from a graph's text what differs between dumps. Keeps shapes, constants and the order."""
    return NUMBERED.sub(r"\1", METADATA.sub("", MODULE_NAME.sub("HloModule", hlo))).strip()
