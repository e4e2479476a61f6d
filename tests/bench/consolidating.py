"""Consolidating a sharded checkpoint: against optimum-neuron's own command, and as the adapter grows.

The checkpoint of optimum-neuron 0.4.5 (tensor parallel, two ranks) is one that the tests read, too, and optimum-cli can
read: with LoRA on q and v only it ends with a KeyError.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import time
from pathlib import Path

from bench.measure import ROOT, SMALL, XLA, Bench, alternate, command, compared, growth
from bench.table import Goal, Line, Result

ARCHIVE = ROOT / "tests/trainer/fixtures/neuron/llama-tp2-fused.tar.xz"
PEER = "optimum-cli"
INSTALL = "pip install --extra-index-url https://pip.repos.neuron.amazonaws.com 'optimum-neuron[training]==0.4.5'"


def measure(work: Path) -> dict[str, Result]:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(work / "fixture", filter="data")
    checkpoint = work / "fixture/checkpoint"
    ours = ("-m", "llama_lora.cli", "consolidate", "--checkpoint", checkpoint, "--output")
    sides = {
        "ours": lambda output: command(*ours, output, libraries=XLA),
        PEER: lambda output: command(PEER, "neuron", "consolidate", checkpoint, output),
    }
    rounds = alternate(work, sides)
    return {f"consolidate-{name}": compared(rounds, key, "ours", PEER) for name, key in MEASURES.items()}


def make_size(work: str, layers: int) -> None:
    """Save a checkpoint of backend native with LoRA on all linear layers."""
    from gpu.random_model import TINY, RandomEngine, random_job
    from llama_lora.backends import checkpoints
    from llama_lora.backends.native.devices import open_device

    os.environ.update(ONE_WORKER)
    folder = Path(work) / str(layers)
    folder.mkdir()
    hidden = 64 if SMALL else 512
    shape = TINY | {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    engine = RandomEngine(random_job(folder, shape, "cpu"), *open_device("cpu"))
    record = checkpoints.CheckpointRecord("bench", step=1, rows_done=1, workers=1)
    checkpoints.save(folder, record, engine.save, engine.workers)


def consolidate_size(work: str, layers: int, output: str) -> dict[str, float]:
    from llama_lora import environment as environment  # sets the variables that torch reads at import
    from llama_lora.backends.native import backend as backend
    from llama_lora.stages.consolidate import consolidate_checkpoint

    began = time.perf_counter()
    consolidate_checkpoint(Path(work) / str(layers) / "step-000001", Path(output))
    return {"seconds": time.perf_counter() - began}


MEASURES = {"time": "wall", "memory": "peak"}
ONE_WORKER = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
ONE_WORKER |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
WORK = "consolidate a checkpoint of optimum-neuron with tensor parallel size 2"
BENCHES = [
    Bench(
        [
            Line("consolidate-time", f"{WORK}: time", "s", Goal(0.25), PEER),
            Line("consolidate-memory", f"{WORK}: peak memory", "MiB", Goal(0.65), PEER),
        ],
        measure,
        "" if shutil.which(PEER) else f"peer not installed: {PEER} is not on the PATH ({INSTALL})",
    ),
    growth("consolidate", "consolidate, LoRA on all linear layers", "layers", make_size, consolidate_size, 8),
]
