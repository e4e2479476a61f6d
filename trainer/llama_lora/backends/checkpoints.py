"""Checkpoints of a training: one folder per saved step, with a list of its files.

    step-000100/  ...               the backend's shards of adapter and optimizer, of all workers
                  checkpoint.json   fingerprint, position, workers, bytes and sha256 of every file, its own sha256
    step-000100.damaged/            one whose files were not as listed: not read again, deleted after later saves

A folder is renamed to its final name once the files of all workers are on the disk: a final name means a complete
checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from genvalues.common import files
from genvalues.common.errors import UserError
from genvalues.common.json_files import (
    Count,
    FileRecord,
    InvalidJson,
    JsonUnreadable,
    PathInside,
    as_record,
    check_own_digest,
    read_object,
    with_own_digest,
)
from llama_lora.backends.failures import OtherWorkerFailed
from llama_lora.backends.held_out import HeldOutState
from llama_lora.backends.worker_group import WorkerGroup
from llama_lora.digests import files_in, other_size, record_of
from llama_lora.probe import ProbeRecord

log = logging.getLogger(__name__)

RECORD = "checkpoint.json"
DAMAGED = ".damaged"  # the end of the name of a checkpoint that was set aside
DELETE = "Delete this folder to train from the start."
OTHER_CHECKPOINT = "Use a complete checkpoint, or train again."


@dataclass(frozen=True)
class CheckpointRecord:
    """The content of checkpoint.json.

    ``rows_done`` counts the training rows consumed: the position to resume from, with any number of workers.
    ``probe`` is only where the training may end: in the last checkpoint, and in that of the lowest held-out loss.
    ``held_out`` says what the training has measured, if it measures the held-out loss.
    """

    fingerprint: str
    step: Count
    rows_done: Count
    workers: int
    tensor_parallel_size: int = 1
    probe: ProbeRecord | None = None
    held_out: HeldOutState | None = None
    files: dict[PathInside, FileRecord] = field(default_factory=dict)


class DamagedCheckpoint(UserError):
    """A file of a checkpoint is missing or is not as its record lists it."""


def save(folder: Path, record: CheckpointRecord, write: Callable[[Path], None], workers: WorkerGroup) -> Path:
    """Save ``folder``/step-N. Every worker calls this and writes its part; all return when everything is durable."""
    target = folder / name_of(record)
    partial_folder = files.whole_folder(target) if workers.rank == 0 else contextlib.nullcontext(target)
    with partial_folder as own:
        partial = workers.broadcast(own)
        error: Exception | None = None
        try:
            write(partial)
        except Exception as failed:
            error = failed
        if workers.any(error is not None):  # all leave together, so that the worker of rank 0 removes the folder
            raise error or OtherWorkerFailed("another worker failed to save")
        if workers.rank == 0:
            listed = {file.relative_to(partial).as_posix(): record_of(file) for file in files_in(partial)}
            write_record(partial, replace(record, files=listed))
    workers.barrier()
    return target


def write_record(checkpoint: Path, record: CheckpointRecord) -> None:
    """Write checkpoint.json."""
    files.write_json(checkpoint / RECORD, with_own_digest(asdict(record)))


def name_of(record: CheckpointRecord) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{record.step:06d}"


def verify_checkpoint(checkpoint: Path) -> CheckpointRecord:
    """Compare every file with the record. Raises DamagedCheckpoint for the first that is missing or differs."""
    record = read_checkpoint_record(checkpoint)
    for name, expected in record.files.items():
        shard, kind = checkpoint / name, "file" if name.endswith(".json") else "shard"
        if difference := other_size(shard, expected.bytes):
            raise DamagedCheckpoint(f"{kind} {difference}", where=str(shard), fix=OTHER_CHECKPOINT)
        try:
            digest = files.sha256(shard)
        except OSError as error:
            raise _unreadable(shard, error.errno or 0, f"cannot be read: {error.strerror}") from None
        if digest != expected.sha256:
            what = f"the {kind}'s digest differs from the one recorded at step {record.step}"
            raise DamagedCheckpoint(what, where=str(shard), fix=OTHER_CHECKPOINT)
    return record


def read_checkpoint_record(checkpoint: Path) -> CheckpointRecord:
    """Read checkpoint.json. Raises DamagedCheckpoint if it is missing or not valid."""
    file = checkpoint / RECORD
    try:
        return _read(file)
    except JsonUnreadable as error:
        raise _unreadable(file, error.errno, str(error)) from None
    except InvalidJson as error:
        raise DamagedCheckpoint(str(error), where=str(file), fix=OTHER_CHECKPOINT) from None


def _unreadable(file: Path, number: int | None, what: str) -> UserError:
    """A bad block is damage. Any other reason, such as missing permissions, says nothing about the content."""
    if number == errno.EIO:
        return DamagedCheckpoint(what, where=str(file), fix=OTHER_CHECKPOINT)
    return UserError(what, where=str(file), fix="Make it readable for the user of the stage.")


def newest_intact(folder: Path, fingerprint: str) -> tuple[Path, CheckpointRecord] | None:
    """Verify the checkpoints of a training from the newest, and set aside those that are damaged, with a warning.

    Returns the first that is intact, or None if nothing was saved. Raises UserError if only damaged ones are left.
    """
    for path in saved(folder):
        try:
            read_checkpoint_record(path)
        except DamagedCheckpoint as damage:
            set_aside(path, damage)
    for path in reversed(complete(folder, fingerprint)):
        try:
            return path, verify_checkpoint(path)
        except DamagedCheckpoint as damage:
            set_aside(path, damage)
    if damaged(folder):
        raise UserError(
            "no checkpoint is left that is not damaged",
            where=str(folder),
            fix=DELETE,
        )
    return None


def set_aside(checkpoint: Path, damage: DamagedCheckpoint) -> None:
    """Rename a damaged checkpoint, so that nothing reads it again, and log a warning."""
    aside = checkpoint.with_name(checkpoint.name + DAMAGED)
    if aside.exists() or aside.is_symlink():
        files.remove(aside)
    checkpoint.rename(aside)
    file = Path(damage.where).relative_to(checkpoint)
    log.warning(f"the checkpoint {checkpoint} is damaged and was renamed to {aside.name} ({file}: {damage.what})")


def saved(folder: Path) -> list[Path]:
    """List the checkpoints except those that were set aside. A file or a link of such a name is none."""
    found = (path for path in sorted(folder.glob("step-*")) if not path.name.endswith(DAMAGED))
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def damaged(folder: Path) -> list[Path]:
    """List the checkpoints that were set aside."""
    return [path for path in sorted(folder.glob(f"step-*{DAMAGED}")) if path.is_dir()]


def complete(folder: Path, fingerprint: str) -> list[Path]:
    """List the complete checkpoints of a training, oldest first.

    They are ordered by consumed rows: with another number of workers a step has another number of rows.
    """
    found = [
        (record.rows_done, path)
        for path in saved(folder)
        if (record := read_complete(path)) and record.fingerprint == fingerprint
    ]
    return [path for _, path in sorted(found)]


def at_rows(folder: Path, fingerprint: str, rows_done: int | None) -> Path | None:
    """The complete checkpoint at a position; None if there is none."""
    for path in complete(folder, fingerprint):
        record = read_complete(path)
        if record and record.rows_done == rows_done:
            return path
    return None


def check_best(folder: Path, record: CheckpointRecord) -> None:
    """Raise UserError if the checkpoint that a training with loadBestModelAtEnd may end with does not exist."""
    state = record.held_out
    if state and state.best_rows_done is not None and not at_rows(folder, record.fingerprint, state.best_rows_done):
        raise UserError(
            f"the checkpoint of the lowest held-out loss (step {state.best_step}) is damaged or was deleted",
            where=str(folder),
            fix=DELETE,
        )


def prune(folder: Path, fingerprint: str, limit: int, *, keep_best: bool = False) -> None:
    """Delete the oldest complete checkpoints beyond ``limit``, and the remains of killed saves.

    If there are as many as ``limit``, damaged ones are deleted too. ``keep_best``: each that stays keeps the one that
    was the best at its time: a training that resumes from it may end with that.
    """
    for leftover in folder.glob(f".step-*{files.PARTIAL}*"):
        files.remove(leftover)
    kept = complete(folder, fingerprint)
    records = filter(None, map(read_complete, kept[-limit:] if keep_best else []))
    best = {at_rows(folder, fingerprint, each.held_out.best_rows_done) for each in records if each.held_out}
    for path in [*kept[:-limit], *(damaged(folder) if len(kept) >= limit else [])]:
        if path not in best:
            shutil.rmtree(path)


def read_complete(checkpoint: Path) -> CheckpointRecord | None:
    """Read checkpoint.json; None if it does not exist or is not valid."""
    try:
        return _read(checkpoint / RECORD)
    except InvalidJson:
        return None


def _read(file: Path) -> CheckpointRecord:
    """Read checkpoint.json. Raises InvalidJson, also if its content is not that of its digest."""
    content = read_object(file)
    record = as_record(content, CheckpointRecord)
    check_own_digest(content, required=False)  # release 0.1 wrote none
    return record
