"""The safetensors shards of a model folder: list their tensors, and change single tensors in place."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from genvalues.common.errors import UserError

if TYPE_CHECKING:
    import torch

# The safetensors names of the supported dtypes, and torch's.
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
COPY_AGAIN = "Copy the file again from its source."


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a shard: dtype (safetensors name), shape, and byte range [begin, end) in the file."""

    shard: str
    dtype: str
    shape: list[int]
    begin: int
    end: int


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """List every tensor of a model folder by name. Reads only the shards' headers.

    A shard is 8 bytes of header length (little endian), the header as JSON, and the data (safetensors format).
    Raises UserError if there are no shards, a shard that the index names is missing, or a shard is truncated.
    """
    tensors: dict[str, StoredTensor] = {}
    for shard in _shards(folder):
        with shard.open("rb") as file:
            try:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            except (struct.error, ValueError, MemoryError, OverflowError):
                raise UserError("not a valid safetensors file", where=str(shard), fix=COPY_AGAIN) from None
        header.pop("__metadata__", None)
        ends = [8 + length + entry["data_offsets"][1] for entry in header.values()]
        if max(ends, default=0) != shard.stat().st_size:
            raise UserError("file is truncated", where=str(shard), fix=COPY_AGAIN)
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = StoredTensor(shard.name, entry["dtype"], entry["shape"], begin, end)
    return tensors


def add_in_place(shard: Path, tensor: StoredTensor, delta: torch.Tensor) -> None:
    """Add ``delta`` (fp32) to a stored tensor. The sum is computed in fp32 and rounded once to the stored dtype.

    It rounds as ``weight.data += delta`` in merge_and_unload() of peft does (0.17 to 0.21).
    """
    import torch

    dtype = getattr(torch, DTYPES[tensor.dtype])
    with shard.open("r+b") as file:
        file.seek(tensor.begin)
        data = bytearray(file.read(tensor.end - tensor.begin))
        weight = torch.frombuffer(data, dtype=dtype).view(tensor.shape)
        weight += delta
        file.seek(tensor.begin)
        file.write(data)


def _shards(folder: Path) -> Iterator[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [folder / name for name in names]
    else:
        shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise UserError("no *.safetensors files", where=str(folder), fix="Pass a model folder with safetensors.")
    for shard in shards:
        if not shard.is_file():
            raise UserError("not found, but the index lists it", where=str(shard), fix=COPY_AGAIN)
        yield shard
