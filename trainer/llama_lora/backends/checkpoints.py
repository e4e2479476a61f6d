"""Checkpoints of a training: one folder per saved step, with a list of its files.

    step-000100/  ...               the backend's shards of adapter and optimizer, of all workers
                  checkpoint.json   fingerprint, position, workers, and bytes and sha256 of every file

A folder is renamed to its final name once the files of all workers are on the disk: a final name means a complete
checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora.backends.worker_group import WorkerGroup

RECORD = "checkpoint.json"


@dataclass(frozen=True)
class CheckpointRecord:
    """The content of checkpoint.json.

    ``rows_done`` counts the training rows consumed: the position to resume from, with any number of workers.
    ``probe`` is a ProbeRecord, only where the training may end: at the last save, and at the lowest held-out loss.
    ``held_out`` is a HeldOutState, if the training measures the held-out loss.
    """

    fingerprint: str
    step: int
    rows_done: int
    workers: int
    tensor_parallel_size: int = 1
    probe: dict[str, Any] | None = None
    held_out: dict[str, Any] | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def save(folder: Path, record: CheckpointRecord, write: Callable[[Path], None], workers: WorkerGroup) -> Path:
    """Save ``folder``/step-N. Every worker calls this and writes its part; all return when everything is durable."""
    target = folder / name_of(record)
    partial_folder = files.whole_folder(target) if workers.rank == 0 else contextlib.nullcontext(target)
    with partial_folder as own:
        partial = workers.broadcast(own)
        write(partial)
        workers.barrier()
        if workers.rank == 0:
            listed = {
                file.relative_to(partial).as_posix(): {"bytes": file.stat().st_size, "sha256": files.sha256(file)}
                for file in sorted(partial.rglob("*"))
                if file.is_file()
            }
            files.write_json(partial / RECORD, {**asdict(record), "files": listed})
    workers.barrier()
    return target


def name_of(record: CheckpointRecord) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{record.step:06d}"


def verify_checkpoint(checkpoint: Path) -> CheckpointRecord:
    """Compare every file with the record. Raises UserError for the first that is missing or differs."""
    record = read_record(checkpoint)
    if record is None:
        raise UserError(f"has no readable {RECORD}", where=str(checkpoint), fix="Pass a folder checkpoints/*/step-N.")
    for name, expected in record.files.items():
        shard = checkpoint / name
        if not shard.is_file():
            raise UserError("shard not found", where=str(shard), fix="Use a complete checkpoint, or train again.")
        if shard.stat().st_size != expected["bytes"] or files.sha256(shard) != expected["sha256"]:
            raise UserError(
                f"the shard's digest differs from the one recorded at step {record.step}",
                where=str(shard),
                fix="Use a complete checkpoint, or train again.",
            )
    return record


def complete(folder: Path, fingerprint: str) -> list[Path]:
    """List the complete checkpoints of a training, oldest first.

    They are ordered by consumed rows: with another number of workers a step has another number of rows.
    """
    found = [
        (record.rows_done, path)
        for path in folder.glob("step-*")
        if (record := read_record(path)) and record.fingerprint == fingerprint
    ]
    return [path for _, path in sorted(found)]


def prune(folder: Path, fingerprint: str, limit: int, keep: Path | None = None) -> None:
    """Delete the oldest complete checkpoints beyond ``limit`` but ``keep``, and the remains of killed saves."""
    for leftover in folder.glob(f".step-*{files.PARTIAL}*"):
        shutil.rmtree(leftover)
    for path in complete(folder, fingerprint)[:-limit]:
        if path != keep:
            shutil.rmtree(path)


def read_record(checkpoint: Path) -> CheckpointRecord | None:
    """Read checkpoint.json; None if it does not exist or is not valid."""
    try:
        return CheckpointRecord(**json.loads((checkpoint / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
