"""In every Python that has this folder on PYTHONPATH, a backend xla that traces and trains nothing.

Its workers are real ones, under torchrun. In a trial run each reports the graphs it would trace, as libneuronxla does;
they depend on the job as real graphs do. STANDIN_USER_ERROR ends all workers with a user error, STANDIN_CRASH names the
rank that crashes, and with STANDIN_SLEEP they wait a minute.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_lora.backends.base import TrainingJob, TrainingResult

KINDS = ("step", "save", "probe")
GARBAGE = 0.123456  # a loss of zeros; must be nowhere


def stand_in() -> Any:
    from llama_lora.backends.xla.backend import XlaBackend

    return type("StandIn", (TracesOnly, XlaBackend), {})()


class TracesOnly:
    def check(self, config: Any, model: Path) -> None:
        pass

    def train(self, job: TrainingJob, finish: Callable[[TrainingResult], None]) -> None:
        rank = os.environ["RANK"]
        if os.environ.get("STANDIN_USER_ERROR"):
            from genvalues.common.errors import UserError

            raise UserError("is more than the model knows", where="training.maxSequenceLength", fix="Set it to 64.")
        if os.environ.get("STANDIN_SLEEP"):
            (job.paths.run / "worker").write_text(str(os.getpid()))
            time.sleep(60)
        if os.environ.get("STANDIN_CRASH") == rank:
            print("RuntimeError: the device is gone", flush=True)
            os._exit(3)
        assert os.environ["NEURON_CC_FLAGS"].endswith(f"--cache_dir={job.paths.compile_cache}")
        for kind in KINDS:
            trace(job, kind)
        barrier(job, "traced")
        if rank == "0":
            from llama_lora.backends.base import TrainingResult

            finish(TrainingResult(job.dry_run or 0, 9, GARBAGE, 1, GARBAGE, GARBAGE, None))
        barrier(job, "finished")


def barrier(job: TrainingJob, name: str) -> None:
    """Of all workers, by files: importing torch takes seconds."""
    folder = job.paths.run / f"barrier-{os.environ['MASTER_PORT']}-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / os.environ["RANK"]).touch()
    while len(list(folder.iterdir())) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.05)


def trace(job: TrainingJob, kind: str) -> None:
    settings = {"kind": kind, "r": job.lora.r, "length": job.training.max_sequence_length}
    number = int(hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:15], 16)
    graph = job.paths.compile_cache / "neuronxcc-2.21.33363.0+82129205" / f"MODULE_{number}+e30acd3a"
    graph.mkdir(parents=True, exist_ok=True)
    if os.environ.get("NEURON_EXTRACT_GRAPHS_ONLY") == "1":
        text = json.dumps(settings)
        partial = graph / f"partial-{os.getpid()}"
        partial.write_text(text)
        partial.rename(graph / "model.hlo_module.pb")
        wrapper = "2025-05-20 18:10:00.000001:  1  INFO ||NEURON_CC_WRAPPER||: "
        path = graph / "model.hlo_module.pb"
        sys.stdout.write(
            f"{wrapper}Extracting graphs ({path}) for ahead-of-time parallel compilation. No compilation was done.\n"
        )
        sys.stdout.flush()


if any("llama-lora" in word or "llama_lora." in word for word in sys.orig_argv[:3]):  # not the program, for its time
    from llama_lora import backends

    backends.get = lambda name: stand_in()  # type: ignore[assignment, return-value]
