"""The CPU backend's checkpoints: real shards of torch.distributed.checkpoint, one folder a step, with a list of them.

    step-000100/  __0_0.distcp __1_0.distcp .metadata   adapter and optimizer, in shards
                  adapter_config.json                   PEFT's
                  checkpoint.json                       fingerprint, position, and every file with bytes and sha256

A folder gets its name only when every rank's files are on the disk, so a complete name is a complete checkpoint.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from genvalues import files
from genvalues.errors import UserError
from llama_lora.backends import Adapter

RECORD = "checkpoint.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = "adapter"  # the state dict's key for the adapter's tensors, by PEFT's names


@dataclass(frozen=True)
class Record:
    """checkpoint.json. ``rows_done`` counts the training rows consumed: where to go on, whoever goes on."""

    fingerprint: str
    step: int
    rows_done: int
    workers: int
    files: dict[str, dict[str, Any]]


def save(folder: Path, state: dict[str, Any], adapter_config: dict[str, Any], record: dict[str, Any]) -> None:
    """Save a checkpoint as ``folder``/step-N; every worker calls this, and returns when all of it is durable."""
    target = folder / f"step-{record['step']:06d}"
    if dist.get_rank() == 0:
        with files.whole_folder(target) as partial:
            _save_shards(partial, state)
            files.write_json(partial / ADAPTER_CONFIG, adapter_config)
            listed = {
                file.name: {"bytes": file.stat().st_size, "sha256": files.sha256(file)}
                for file in sorted(partial.iterdir())
            }
            files.write_json(partial / RECORD, {**record, "files": listed})
    else:
        _save_shards(None, state)
    dist.barrier()


def _save_shards(partial: Path | None, state: dict[str, Any]) -> None:
    place = [str(partial)]
    dist.broadcast_object_list(place, src=0)
    dcp.save(state, checkpoint_id=place[0])  # fsyncs each shard
    dist.barrier()


def load(checkpoint: Path, state: dict[str, Any]) -> Record:
    """Fill ``state`` (tensors of the right shapes) in place; every worker calls this."""
    record = check(checkpoint)
    dcp.load(state, checkpoint_id=str(checkpoint))
    return record


def check(checkpoint: Path) -> Record:
    """Every file of a checkpoint against its list. Raises UserError naming the first that is missing or different."""
    record = _record(checkpoint)
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
        if (record := _record(path)) and record.fingerprint == fingerprint
    ]
    return [path for _, path in sorted(found)]


def prune(folder: Path, fingerprint: str, limit: int) -> None:
    """Delete the oldest complete checkpoints beyond ``limit``, and what a killed save has left."""
    for leftover in folder.glob(f".step-*{files.PARTIAL}*"):
        shutil.rmtree(leftover)
    for path in complete(folder, fingerprint)[:-limit]:
        shutil.rmtree(path)


def read_adapter(checkpoint: Path) -> Adapter:
    """The adapter's tensors out of the shards, without a model or a process group. Raises UserError as ``check``."""
    check(checkpoint)
    config = json.loads((checkpoint / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        name.removeprefix(f"{ADAPTER}."): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith(f"{ADAPTER}.") and isinstance(entry, TensorStorageMetadata)
    }
    logging.getLogger("torch.distributed.checkpoint").setLevel(
        logging.ERROR
    )  # "assuming the intent is to load in a single process": it is
    dcp.load({ADAPTER: tensors}, checkpoint_id=str(checkpoint), no_dist=True)
    for name, tensor in tensors.items():
        if ("lora_A" in name and tensor.shape[0] != config["r"]) or (
            "lora_B" in name and tensor.shape[1] != config["r"]
        ):
            raise UserError(
                f"{name} has shape {list(tensor.shape)}, but {ADAPTER_CONFIG} says r = {config['r']}",
                where=str(checkpoint),
            )
    return Adapter(tensors, config)


def _record(checkpoint: Path) -> Record | None:
    try:
        return Record(**json.loads((checkpoint / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
