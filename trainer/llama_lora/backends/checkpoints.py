"""Checkpoints of a training: a folder a step, whatever the backend has in it, with a list of its files.

    step-000100/  ...               the backend's shards of adapter and optimizer, of every worker
                  checkpoint.json   fingerprint, position, workers, and every file with bytes and sha256

A folder gets its name only when every worker's files are on the disk, so a complete name is a complete checkpoint.
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
from llama_lora.backends.workers import Workers

RECORD = "checkpoint.json"


@dataclass(frozen=True)
class Record:
    """checkpoint.json. ``rows_done`` counts the training rows consumed: where to go on, whoever goes on.

    ``probe`` is what the probe measured (llama_lora.probe), at the last save of a training alone.
    """

    fingerprint: str
    step: int
    rows_done: int
    workers: int
    tensor_parallel_size: int = 1
    probe: dict[str, Any] | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def save(folder: Path, record: Record, write: Callable[[Path], None], workers: Workers) -> Path:
    """Save ``folder``/step-N; every worker calls this, ``write``s its part, and returns when all of it is durable."""
    target = folder / f"step-{record.step:06d}"
    beside = files.whole_folder(target) if workers.rank == 0 else contextlib.nullcontext(target)
    with beside as own:
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


def check(checkpoint: Path) -> Record:
    """Every file of a checkpoint against its list. Raises UserError naming the first that is missing or different."""
    record = read_record(checkpoint)
    if record is None:
        raise UserError(f"has no readable {RECORD}", where=str(checkpoint), fix="Give a folder checkpoints/*/step-N.")
    for name, expected in record.files.items():
        shard = checkpoint / name
        if not shard.is_file():
            raise UserError("this shard is missing", where=str(shard), fix="Use a complete checkpoint, or train again.")
        if shard.stat().st_size != expected["bytes"] or files.sha256(shard) != expected["sha256"]:
            raise UserError(
                f"this shard is not the one saved at step {record.step} (its digest differs)",
                where=str(shard),
                fix="Use a complete checkpoint, or train again.",
            )
    return record


def complete(folder: Path, fingerprint: str) -> list[Path]:
    """The complete checkpoints of a training, oldest first.

    By the rows they have consumed: a step is another number of rows once other workers go on.
    """
    found = [
        (record.rows_done, path)
        for path in folder.glob("step-*")
        if (record := read_record(path)) and record.fingerprint == fingerprint
    ]
    return [path for _, path in sorted(found)]


def prune(folder: Path, fingerprint: str, limit: int) -> None:
    """Delete the oldest complete checkpoints beyond ``limit``, and what a killed save has left."""
    for leftover in folder.glob(f".step-*{files.PARTIAL}*"):
        shutil.rmtree(leftover)
    for path in complete(folder, fingerprint)[:-limit]:
        shutil.rmtree(path)


def read_record(checkpoint: Path) -> Record | None:
    """checkpoint.json, or None where there is none that can be read."""
    try:
        return Record(**json.loads((checkpoint / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
