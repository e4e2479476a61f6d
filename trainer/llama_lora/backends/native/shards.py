"""The content of a native checkpoint: adapter and optimizer in parts, as safetensors.

    part-00003.safetensors   what worker 3 holds and no worker before it; offsets in the metadata
    adapter_config.json      PEFT's config of the adapter
    training.json            format, and the number of optimizer steps

Any layout of workers reads the parts of any other. checkpoints.py adds the list of files with their digests.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from genvalues.common import files
from genvalues.common.errors import UserError
from genvalues.common.json_files import InvalidJson, read_object
from llama_lora.adapter import FACTOR, TRAIN_LOWER, check_targets, other_factor, read_adapter_config
from llama_lora.backends.base import Adapter
from llama_lora.backends.native.optimizer import MOMENTS, LocalAdamW
from llama_lora.backends.native.regions import Part, Region, StoredWeights, local_region, write_parts
from llama_lora.backends.worker_group import WorkerGroup
from llama_lora.safetensors_files import is_finite

FORMAT = 1
ADAPTER_CONFIG, TRAINING = "adapter_config.json", "training.json"
ADAPTER = "adapter"  # prefix of the adapter's tensors; those of the optimizer are prefixed with the moment's name
PARTS = "part-*.safetensors"
PART_NAME = re.compile(r"part-\d+\.safetensors")


def save_parts(folder: Path, optimizer: LocalAdamW, adapter_config: Mapping[str, Any], workers: WorkerGroup) -> None:
    """Write this worker's parts. All workers call it, each with an optimizer at the same step.

    Of the workers that hold the same part the first writes it. Raises UserError if their values differ.
    """
    regions = {name: local_region(parameter) for name, parameter in optimizer.parameters.items()}
    adapter = {name: local.cpu() for name, local in optimizer.local.items()}
    held = workers.gather([(name, regions[name], digest(adapter[name])) for name in adapter])
    check_copies(held)
    own = first_holder(held)
    parts: dict[str, Part] = {}
    for name, region in regions.items():
        if own[name, region] != workers.rank or region.empty:
            continue
        shape = tuple(optimizer.parameters[name].shape)
        parts[f"{ADAPTER}/{name}"] = Part(region, shape, adapter[name])
        for moment in MOMENTS:
            parts[f"{moment}/{name}"] = Part(region, shape, optimizer.state(name)[moment].cpu())
    if parts:
        file = folder / f"part-{workers.rank:05d}.safetensors"
        write_parts(file, parts)
        files.settle(file)
    if workers.rank == 0:
        files.write_json(folder / ADAPTER_CONFIG, adapter_config)
        files.write_json(folder / TRAINING, {"format": FORMAT, "optimizerSteps": optimizer.steps})


def load_parts(folder: Path, listed: Iterable[str], optimizer: LocalAdamW) -> None:
    """Read this worker's parts from the files that the checkpoint's record lists. Their digests have been verified."""
    stored = stored_parts(folder, listed)
    for name, parameter in optimizer.parameters.items():
        region = local_region(parameter)
        read_to(optimizer.local[name], stored, f"{ADAPTER}/{name}", region)
        for moment in MOMENTS:
            read_to(optimizer.state(name)[moment], stored, f"{moment}/{name}", region)
    optimizer.steps = read_training(folder)["optimizerSteps"]


def read_to(target: torch.Tensor, stored: StoredWeights, name: str, region: Region) -> None:
    """Read a region over a CPU copy: one transfer to the device, whatever parts it comes from."""
    if not region.empty:
        values = torch.empty(target.shape, dtype=target.dtype)
        stored.read_into(values, name, region)
        target.copy_(values)


def read_adapter(folder: Path, listed: Iterable[str]) -> Adapter:
    """Read the whole adapter, without workers. Raises UserError if a part is missing or does not fit the config."""
    read_training(folder)
    config = read_adapter_config(folder)
    stored = stored_parts(folder, listed)
    prefix = f"{ADAPTER}/"
    tensors = {name.removeprefix(prefix): stored.read(name) for name in sorted(stored.parts) if name.startswith(prefix)}
    if not tensors:
        raise UserError("has no part of the adapter", where=str(folder), fix="Use a complete checkpoint.")
    check_targets(tensors, config, folder)
    for name, tensor in tensors.items():
        if not FACTOR.fullmatch(name) or tensor.dim() != 2 or other_factor(name) not in tensors:
            raise UserError(f"{name} is not one of two LoRA factors", where=str(folder), fix="Use another checkpoint.")
        if not is_finite(tensor):
            raise UserError(f"{name} contains values that are not finite", where=str(folder), fix=TRAIN_LOWER)
        rank = tensor.shape[0] if ".lora_A." in name else tensor.shape[1]
        if rank != config["r"]:
            raise UserError(
                f"{name} has shape {list(tensor.shape)}, but {ADAPTER_CONFIG} says r = {config['r']}",
                where=str(folder),
                fix="Use a complete checkpoint, or train again.",
            )
    return Adapter(tensors, config)


def stored_parts(folder: Path, listed: Iterable[str]) -> StoredWeights:
    return StoredWeights.of_parts(folder, [folder / name for name in sorted(listed) if PART_NAME.fullmatch(name)])


def read_training(folder: Path) -> dict[str, Any]:
    """Read training.json. Raises UserError if the checkpoint has another format."""
    try:
        found = read_object(folder / TRAINING)
        if found.get("format") == FORMAT and type(found.get("optimizerSteps")) is int and found["optimizerSteps"] >= 0:
            return found
    except InvalidJson:
        pass
    raise UserError(
        f"has no {TRAINING} of format {FORMAT}",
        where=str(folder),
        fix="Use the version of llama-lora that wrote this checkpoint, or train again.",
    )


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


Held = list[list[tuple[str, Region, str]]]


def check_copies(held: Held) -> None:
    """Raise UserError if workers that hold the same part of the adapter hold different values.

    ``held`` lists for each worker name, region and digest of its parts.
    """
    seen: dict[tuple[str, Region], tuple[int, str]] = {}
    for worker, parts in enumerate(held):
        for name, region, value in parts:
            first, expected = seen.setdefault((name, region), (worker, value))
            if value != expected:
                raise UserError(
                    f"workers {first} and {worker} hold different values of {name}; nothing was saved",
                    where="train",
                    fix="Report this with the run's log: gradients were not summed over all copies.",
                )


def first_holder(held: Held) -> dict[tuple[str, Region], int]:
    """The first worker that holds each part."""
    holders: dict[tuple[str, Region], int] = {}
    for worker, parts in enumerate(held):
        for name, region, _ in parts:
            holders.setdefault((name, region), worker)
    return holders


def is_native_checkpoint(folder: Path) -> bool:
    return (folder / TRAINING).is_file() or any(folder.glob(PARTS))
