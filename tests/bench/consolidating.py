"""Consolidating a sharded checkpoint: against optimum-neuron's own command, and as the adapter grows.

The checkpoint of optimum-neuron 0.4.5 (tensor parallel, two ranks) is one that the tests read, too.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import time
from pathlib import Path

from bench.growing import Size, growth
from bench.measure import ROOT, SMALL, XLA, Bench, Sides, alternate, command, compared, peak, serve, wall
from bench.table import Goal, Line

ARCHIVE = ROOT / "tests/trainer/fixtures/neuron/llama-tp2-qv.tar.xz"
PEER = "optimum-cli"
INSTALL = "pip install 'optimum-neuron[training]==0.4.5' from AWS's repository, and optimum-cli on the PATH"


def measure(work: Path) -> dict[str, Sides]:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(work / "fixture", filter="data")
    checkpoint = work / "fixture/checkpoint"
    ours = ("-m", "llama_lora.cli", "consolidate", "--checkpoint", checkpoint, "--output")
    sides = {
        "ours": lambda output: command(*ours, output, libraries=XLA),
        PEER: lambda output: command(PEER, "neuron", "consolidate", checkpoint, output),
    }
    rounds = alternate(work, sides)
    return {
        "consolidate-time": compared(rounds, wall, theirs=PEER),
        "consolidate-memory": compared(rounds, peak, theirs=PEER),
    }


def lacks_peer() -> str:
    return "" if shutil.which(PEER) else f"peer not installed: {INSTALL}"


def make_size(work: str, layers: int) -> None:
    """Save a checkpoint of backend native with LoRA on all linear layers of so many layers."""
    from gpu.random_model import TINY, RandomEngine, random_job
    from llama_lora.backends import checkpoints
    from llama_lora.backends.native.devices import open_device

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    folder = Path(work) / str(layers)
    folder.mkdir()
    device, workers = open_device("cpu")
    hidden = 64 if SMALL else 512
    shape = TINY | {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    engine = RandomEngine(random_job(folder, shape, "cpu"), device, workers)
    record = checkpoints.CheckpointRecord("bench", step=1, rows_done=1, workers=1)
    checkpoints.save(folder, record, engine.save, workers)


def consolidate_size(work: str, layers: int) -> dict[str, float]:
    from llama_lora import environment as environment  # sets the variables that torch reads at import
    from llama_lora.backends.native import backend as backend
    from llama_lora.stages.consolidate import consolidate_checkpoint

    folder = Path(work) / str(layers)
    began = time.perf_counter()
    consolidate_checkpoint(folder / "step-000001", folder / "adapter")
    seconds = time.perf_counter() - began
    shutil.rmtree(folder / "adapter")
    return {"seconds": seconds}


WORK = "consolidate a checkpoint of optimum-neuron, tensor parallel 2"
BENCHES = [
    Bench(
        [
            Line("consolidate-time", f"{WORK}: time", "s", Goal(0.25), PEER),
            Line("consolidate-memory", f"{WORK}: peak memory", "MiB", Goal(0.65), PEER),
        ],
        measure,
        lacks_peer,
    ),
    growth("consolidate", "consolidate LoRA on all linear layers", "layers", Size("bench.consolidating", "make_size", "consolidate_size", 8)),
]

if __name__ == "__main__":
    serve(globals())
