"""Where an accelerator plugs in: everything that differs between CPU and Trainium is behind ``Backend`` (base.py).

Shared by all: the stages, the data, the plan of steps, the loss, merging and evaluation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from genvalues.common.errors import UserError
from llama_lora.backends.base import Backend
from llama_lora.probe import Probe


def of_checkpoint(checkpoint: Path) -> Backend:
    """The backend that has written a checkpoint, by what is in the folder. Raises UserError for anything else."""
    from llama_lora.backends.neuron.shards import is_neuron_checkpoint

    if is_neuron_checkpoint(checkpoint):
        return get("neuron")
    if (checkpoint / "checkpoint.json").is_file() or any(checkpoint.glob("*.distcp")):
        return get("cpu")
    raise UserError("is no checkpoint", where=str(checkpoint), fix="Give a folder checkpoints/*/step-N.")


def probe_of(checkpoint: Path) -> Probe | None:
    """What the probe measured when a checkpoint was saved; None where it did not."""
    from llama_lora.backends.checkpoints import read_record

    record = read_record(checkpoint)
    return Probe(**record.probe) if record and record.probe else None


def get(name: Literal["cpu", "neuron"]) -> Backend:
    """The backend of a run config."""
    if name == "cpu":
        from llama_lora.backends.cpu import CpuBackend

        return CpuBackend()
    from llama_lora.backends.neuron import NeuronBackend

    return NeuronBackend()
