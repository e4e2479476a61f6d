"""Parts of tensors: which part of a parameter this worker holds, and reading just that part from safetensors files.

Base weights and checkpoints are both read this way. Nothing is unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from genvalues.common.errors import UserError
from llama_lora.safetensors_files import DTYPES, Header, read_header, stored_tensors


@dataclass(frozen=True)
class Region:
    """A box in a tensor: the index of its first element in each dimension, and its shape."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(first, first + size) for first, size in zip(self.offset, self.shape, strict=True))

    @property
    def empty(self) -> bool:
        return 0 in self.shape

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This part of a whole tensor, as a view."""
        return tensor[self.slices]

    def intersection(self, other: Region) -> Region:
        """The common part; empty if there is none."""
        first = tuple(max(pair) for pair in zip(self.offset, other.offset, strict=True))
        ends = zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        last = (min(a + a_size, b + b_size) for a, a_size, b, b_size in ends)
        return Region(first, tuple(max(0, end - begin) for begin, end in zip(first, last, strict=True)))

    def within(self, other: Region) -> Region:
        """This region with offsets counted from the first element of ``other``."""
        return Region(tuple(a - b for a, b in zip(self.offset, other.offset, strict=True)), self.shape)


def whole(shape: Sequence[int]) -> Region:
    return Region((0,) * len(shape), tuple(shape))


def local_region(tensor: torch.Tensor) -> Region:
    """The part of a tensor that this worker holds: all of it, unless it is a DTensor."""
    if not isinstance(tensor, DTensor):
        return whole(tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Region(tuple(offset), tuple(shape))


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This worker's part, sharing the memory, without gradient history."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class StoredPart:
    """A tensor in a safetensors file: a part of a larger one, or a whole one."""

    file: Path
    key: str
    region: Region


class Part(NamedTuple):
    """A worker's part of a tensor: where it is in the whole, the shape of the whole, and the values (CPU)."""

    region: Region
    whole_shape: tuple[int, ...]
    values: torch.Tensor


@dataclass
class StoredWeights:
    """Tensors by name, each in parts over the safetensors files of a folder."""

    folder: Path
    parts: dict[str, list[StoredPart]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    _open: dict[Path, Any] = field(default_factory=dict)

    @classmethod
    def of_model(cls, folder: Path) -> StoredWeights:
        """The weights of a model folder. Raises UserError if the folder is not complete."""
        stored = stored_tensors(folder)
        parts = {name: [StoredPart(folder / each.shard, name, whole(each.shape))] for name, each in stored.items()}
        shapes = {name: tuple(each.shape) for name, each in stored.items()}
        return cls(folder, parts, shapes, {name: each.dtype for name, each in stored.items()})

    @classmethod
    def of_parts(cls, folder: Path, files: Iterable[Path]) -> StoredWeights:
        """The tensors of files that ``write_parts`` has written.

        Raises UserError if a file is damaged, or the parts of a tensor do not cover it exactly once.
        """
        stored = cls(folder)
        for file in files:
            header = read_header(file)
            described = _described(header, file)
            for key, tensor in header.tensors.items():
                region, shape = described[key]
                same = stored.shapes.setdefault(key, shape) == shape
                if not same or stored.dtypes.setdefault(key, tensor.dtype) != tensor.dtype:
                    raise _not_a_part(f"{key} has another shape or dtype in another file", file)
                stored.parts.setdefault(key, []).append(StoredPart(file, key, region))
        for key, parts in stored.parts.items():
            if not covers_once([part.region for part in parts], stored.shapes[key]):
                raise stored._misfit(key, whole(stored.shapes[key]))
        return stored

    def read_into(self, target: torch.Tensor, name: str, region: Region) -> None:
        """Copy one region of a tensor into ``target``, which has the region's shape; convert to its dtype.

        Raises UserError if the tensor is missing, or its parts do not cover the region exactly once.
        """
        covered = 0
        for part in self.parts.get(name, []):
            if len(part.region.shape) != len(region.shape):
                raise self._misfit(name, region)
            common = region.intersection(part.region)
            if common.empty:
                continue
            values = self._slice(part)[common.within(part.region).slices]
            common.within(region).of(target).copy_(values)
            covered += values.numel()
        if name not in self.parts or covered != target.numel():
            raise self._misfit(name, region)

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Read a whole tensor."""
        tensor = torch.empty(self.shapes[name], dtype=dtype)
        self.read_into(tensor, name, whole(tensor.shape))
        return tensor

    def _slice(self, part: StoredPart) -> Any:
        from safetensors import safe_open

        if part.file not in self._open:
            self._open[part.file] = safe_open(part.file, framework="pt")
        return self._open[part.file].get_slice(part.key)

    def _misfit(self, name: str, region: Region) -> UserError:
        found = [[list(part.region.offset), list(part.region.shape)] for part in self.parts.get(name, [])]
        return UserError(
            f"{name} does not have the part from {list(region.offset)} of shape {list(region.shape)}; it has {found}",
            where=str(self.folder),
            fix="Use a complete copy.",
        )


def _described(header: Header, file: Path) -> dict[str, tuple[Region, tuple[int, ...]]]:
    """The region and the whole shape of each tensor of a file of parts, from its metadata."""
    try:
        described = json.loads(header.metadata[PARTS])
        found = {
            key: (Region(_counts(described[key]["offset"]), tuple(tensor.shape)), _counts(described[key]["shape"]))
            for key, tensor in header.tensors.items()
        }
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _not_a_part(f"{type(error).__name__}: {error}", file) from None
    for key, (region, shape) in found.items():
        if header.tensors[key].dtype not in DTYPES:
            raise _not_a_part(f"{key} has dtype {header.tensors[key].dtype}", file)
        ends = zip(region.offset, region.shape, shape, strict=False)
        if not len(region.offset) == len(region.shape) == len(shape) or any(
            offset + size > most for offset, size, most in ends
        ):
            raise _not_a_part(f"{key} is not within its whole shape", file)
    return found


def _counts(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(each) is int and 0 <= each < 1 << 48 for each in values):
        raise ValueError("offset and shape must be lists of numbers")
    return tuple(values)


def _not_a_part(why: str, file: Path) -> UserError:
    return UserError(f"not a part of a checkpoint: {why}", where=str(file), fix="Use a complete checkpoint.")


def covers_once(regions: Sequence[Region], shape: Sequence[int]) -> bool:
    """Whether regions of a tensor of this shape cover each of its elements exactly once."""
    cuts = [
        sorted({0, size, *(cut for r in regions for cut in (r.offset[axis], r.offset[axis] + r.shape[axis]))})
        for axis, size in enumerate(shape)
    ]
    if math.prod(map(len, cuts)) > MOST_CELLS:
        return False
    counts = torch.zeros([len(axis) - 1 for axis in cuts], dtype=torch.int32)
    for region in regions:
        cells = tuple(
            slice(axis.index(offset), axis.index(offset + size))
            for axis, offset, size in zip(cuts, region.offset, region.shape, strict=True)
        )
        counts[cells] += 1
    return bool((counts == 1).all())


MOST_CELLS = 1 << 20  # of the grid of all parts' edges; 128 workers in two dimensions have 16,641
PARTS = "parts"  # metadata key of a file of parts: JSON, name -> {offset, shape of the whole tensor}


def write_parts(file: Path, parts: Mapping[str, Part]) -> None:
    """Write parts of tensors as one safetensors file, with their places in its metadata."""
    from safetensors.torch import save_file

    described = {
        name: {"offset": list(part.region.offset), "shape": list(part.whole_shape)} for name, part in parts.items()
    }
    tensors = {name: part.values.contiguous() for name, part in parts.items()}
    save_file(tensors, file, metadata={"format": "pt", PARTS: json.dumps(described)})
