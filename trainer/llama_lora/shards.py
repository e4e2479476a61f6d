"""A model's safetensors shards: what is in them, and patching single tensors in place."""

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

# safetensors' names of dtypes, for those a base model's weights come in.
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor inside a shard: its dtype by safetensors' name, and where its bytes are in the file."""

    shard: str
    dtype: str
    shape: list[int]
    begin: int
    end: int


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder by name, from the shards' headers alone.

    A shard is 8 bytes of header length (little endian), the header as JSON, and the data (the safetensors format).
    Raises UserError where there are no shards, one that the index names is missing, or one is cut short.
    """
    tensors: dict[str, StoredTensor] = {}
    for shard in _shards(folder):
        with shard.open("rb") as file:
            try:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            except (struct.error, ValueError, MemoryError, OverflowError):
                raise UserError(
                    "is no safetensors file", where=str(shard), fix="Copy it again from its origin."
                ) from None
        header.pop("__metadata__", None)
        ends = [8 + length + entry["data_offsets"][1] for entry in header.values()]
        if max(ends, default=0) != shard.stat().st_size:
            raise UserError("is cut short", where=str(shard), fix="Copy it again from its origin.")
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = StoredTensor(shard.name, entry["dtype"], entry["shape"], begin, end)
    return tensors


def add_in_place(shard: Path, tensor: StoredTensor, delta: torch.Tensor) -> None:
    """Add ``delta`` (fp32) to a stored tensor: the sum is taken in fp32 and rounded once to the stored dtype.

    The rounding is that of ``weight.data += delta`` in peft 0.17's merge_and_unload().
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
        raise UserError(
            "holds no *.safetensors weights", where=str(folder), fix="Give a model folder with safetensors."
        )
    for shard in shards:
        if not shard.is_file():
            raise UserError(
                "is missing, but the index names it", where=str(shard), fix="Copy it again from its origin."
            )
        yield shard
