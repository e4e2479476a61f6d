"""The accelerators. What differs between CPU and Trainium is behind the ``Backend`` protocol (base.py).

All backends share the stages, the data, the step plan, the loss, merging and evaluation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from genvalues.common.errors import UserError
from llama_lora.backends.base import Backend
from llama_lora.probe import ProbeRecord


def get(name: Literal["native", "xla"]) -> Backend:
    """Return the backend that a run config names."""
    if name == "native":
        from llama_lora.backends.native.backend import NativeBackend

        return NativeBackend()
    from llama_lora.backends.xla.backend import XlaBackend

    return XlaBackend()


def of_checkpoint(checkpoint: Path) -> Backend:
    """Return the backend that wrote a checkpoint, detected from its files. Raises UserError for other folders."""
    from llama_lora.backends.native.shards import is_native_checkpoint
    from llama_lora.backends.xla.shards import is_xla_checkpoint

    if is_xla_checkpoint(checkpoint):
        return get("xla")
    if is_native_checkpoint(checkpoint) or (checkpoint / "checkpoint.json").is_file():  # the latter of release 0.1
        return get("native")
    raise UserError("not a checkpoint", where=str(checkpoint), fix="Pass a folder checkpoints/*/step-N.")


def probe_of(checkpoint: Path) -> ProbeRecord | None:
    """Return the probe recorded in a checkpoint; None if it has none."""
    from llama_lora.backends.checkpoints import read_complete

    record = read_complete(checkpoint)
    return record.probe if record else None
