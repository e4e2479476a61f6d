"""The safetensors shards of a model folder: list and read their tensors, and copy a shard with some of them changed."""

from __future__ import annotations

import json
import math
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from genvalues.common import files
from genvalues.common.errors import UserError
from genvalues.common.json_files import DuplicateKey, unique_keys
from llama_lora.model_files import COPY_AGAIN, INDEX, WEIGHTS, regular_file, shards_in

if TYPE_CHECKING:
    import torch

# The safetensors names of the supported dtypes, and torch's.
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
# The bits of an element of every dtype: https://github.com/huggingface/safetensors/blob/main/safetensors/src/tensor.rs.
BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
MOST_HEADER_BYTES = 100_000_000  # safetensors' own limit
SPAN = 1 << 20  # bytes that a thread copies at once: with the sum in fp32 they stay in a core's cache
WRITTEN_TOGETHER = 1 << 26  # bytes of a file that the disk gets at a time


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a shard: dtype (safetensors name), shape, and byte range [begin, end) in the file."""

    shard: str
    dtype: str
    shape: list[int]
    begin: int
    end: int


class Header(NamedTuple):
    """The header of a safetensors file: its tensors by name, and its metadata."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


class _Invalid(Exception):
    """Why a header is not valid."""


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """List every tensor of a model folder by name. Reads only the shards' headers.

    Raises UserError if there are no shards, a shard is missing or damaged, or a tensor is not where the index says.
    """
    tensors: dict[str, StoredTensor] = {}
    shards, indexed = _shards(folder)
    for shard, file in shards.items():
        for name, tensor in read_header(file, shard).tensors.items():
            if name in tensors:
                raise UserError(f"{name} is also in {tensors[name].shard}", where=str(file), fix=COPY_AGAIN)
            tensors[name] = tensor
    for name, shard_name in indexed.items():
        if name not in tensors or tensors[name].shard != shard_name:
            raise UserError(f"{name} not found, but the index lists it", where=str(folder / shard_name), fix=COPY_AGAIN)
    return tensors


def read_header(shard: Path, name: str = "") -> Header:
    """Read the header of a safetensors file, and check it as strictly as safetensors does, and a little more.

    ``name``: what a folder calls it, if not by its own name.

    A file is 8 bytes of header length (little endian), the header as JSON, and the data. The tensors' byte ranges cover
    the data exactly once, and each has the size of its dtype and shape. Raises UserError.
    """
    try:
        with files.open_regular(shard) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if len(start) < 8 or length > size - 8:
                raise _Invalid("the file is truncated" if size else "the file is empty")
            if length > MOST_HEADER_BYTES:
                raise _Invalid(f"the header has {length} bytes, the most is {MOST_HEADER_BYTES}")
            return _header(name or shard.name, file.read(length), size)
    except FileNotFoundError:
        raise UserError("not found", where=str(shard), fix=COPY_AGAIN) from None
    except OSError as error:
        reason = "is a symbolic link" if shard.is_symlink() else f"cannot be read: {error.strerror}"
        raise UserError(reason, where=str(shard), fix=COPY_AGAIN) from None
    except _Invalid as problem:
        raise UserError(f"not a valid safetensors file: {problem}", where=str(shard), fix=COPY_AGAIN) from None


def _header(shard: str, text: bytes, size: int) -> Header:
    begin = 8 + len(text)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=_refuse_constant)
    except DuplicateKey as error:
        raise _Invalid(f"the header has {error.key!r} twice") from None
    except (ValueError, RecursionError) as error:
        raise _Invalid(f"the header is not valid JSON ({type(error).__name__})") from None
    if not isinstance(header, dict):
        raise _Invalid("the header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Invalid("__metadata__ does not map names to text")
    tensors = {name: _tensor(name, entry, shard, begin) for name, entry in header.items()}
    end, before = begin, ""
    for name, tensor in sorted(tensors.items(), key=lambda pair: (pair[1].begin, pair[1].end)):
        if tensor.begin != end:
            between = f"between {before} and {name}" if before else f"before {name}"
            what = f"{name} overlaps {before}" if tensor.begin < end else f"{tensor.begin - end} bytes {between}"
            raise _Invalid(what + ("" if tensor.begin < end else " belong to no tensor"))
        end, before = tensor.end, name
    if end > size:
        raise _Invalid("the file is truncated")
    if end < size:
        raise _Invalid(f"{size - end} bytes at its end belong to no tensor")
    return Header(tensors, metadata)


def _tensor(name: str, entry: Any, shard: str, data: int) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Invalid(f"{name} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _Invalid(f"{name} has the unknown dtype {dtype!r}")
    if not _are_counts(shape):
        raise _Invalid(f"{name} has an invalid shape")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Invalid(f"{name} has invalid data_offsets")
    begin, end = offsets
    if math.prod(shape) * BITS[dtype] != (end - begin) * 8:
        raise _Invalid(f"{name} of dtype {dtype} and shape {shape} has {end - begin} bytes")
    return StoredTensor(shard, dtype, shape, data + begin, data + end)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(each) is int and 0 <= each < 1 << 48 for each in values)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def read_into(target: torch.Tensor, shard: Path, tensor: StoredTensor) -> None:
    """Read a stored tensor into ``target``, which has its shape; convert to its dtype.

    It reads, and maps nothing: mapped pages would count as memory of the process. Raises UserError if the file ends.
    """
    import torch

    dtype = getattr(torch, DTYPES[tensor.dtype])
    values = target if target.dtype == dtype else torch.empty(target.shape, dtype=dtype)
    content = memoryview(values.flatten().view(torch.uint8).numpy())
    with files.open_regular(shard) as file:
        file.seek(tensor.begin)
        if file.readinto(content) != tensor.end - tensor.begin:
            raise UserError("the file is truncated", where=str(shard), fix=COPY_AGAIN)
    if values is not target:
        target.copy_(values)


def is_same(folder: Path, one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors of a model folder have the same dtype, shape and bytes. Memory: SPAN, twice."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with (
        files.open_regular(regular_file(folder, one.shard)) as first,
        files.open_regular(regular_file(folder, other.shard)) as second,
    ):
        first.seek(one.begin)
        second.seek(other.begin)
        sizes = (min(SPAN, one.end - at) for at in range(one.begin, one.end, SPAN))
        return all(first.read(size) == second.read(size) for size in sizes)


class Span(NamedTuple):
    """Bytes [begin, end) of a shard: rows from ``row`` on of the tensor ``name``, which changes; no name: they stay."""

    begin: int
    end: int
    name: str = ""
    row: int = 0


def spans(size: int, targets: Mapping[str, StoredTensor]) -> Iterator[Span]:
    """Divide a shard of ``size`` bytes into spans of about SPAN bytes, in order. ``targets`` are matrices to change."""
    at = 0
    for name, tensor in sorted(targets.items(), key=lambda pair: pair[1].begin):
        yield from (Span(begin, min(begin + SPAN, tensor.begin)) for begin in range(at, tensor.begin, SPAN))
        at, rows = tensor.end, tensor.shape[0]
        # Evenly: for a single row that is left over BLAS would take another kernel, whose bits may differ.
        parts = min(rows, -(-(tensor.end - tensor.begin) // SPAN))
        for row, next_row in pairwise(rows * part // parts for part in range(parts + 1) if parts):
            width = (tensor.end - tensor.begin) // rows
            yield Span(tensor.begin + row * width, tensor.begin + next_row * width, name, row)
    yield from (Span(begin, min(begin + SPAN, size)) for begin in range(at, size, SPAN))


def copy_changed(
    source: Path,
    target: Path,
    targets: Mapping[str, StoredTensor],
    change: Callable[[str, torch.Tensor, int], torch.Tensor],
) -> Iterator[tuple[memoryview, memoryview]]:
    """Copy a shard, and yield what was read and what was written of each span, in the order of the file.

    ``change`` gets a target's name, some of its rows, and the number of the first; it returns what to write instead.
    Spans are copied side by side, one on each core, so memory is a few MiB for each core. Raises UserError if the file
    ends, or a changed value is not finite.
    """
    import torch

    def copy(span: Span) -> tuple[memoryview, memoryview]:
        content = bytearray(span.end - span.begin)
        if os.preadv(read.fileno(), [content], span.begin) != len(content):
            raise UserError("the file is truncated", where=str(source), fix=COPY_AGAIN)
        before = after = memoryview(content)
        if span.name:
            tensor = targets[span.name]
            rows = torch.frombuffer(content, dtype=getattr(torch, DTYPES[tensor.dtype])).view(-1, tensor.shape[1])
            changed = change(span.name, rows, span.row)
            if not is_finite(changed):
                raise UserError(
                    f"{span.name} plus its delta has values that are not finite",
                    where=str(source),
                    fix="Check the base model, and lora_alpha and r of the adapter.",
                )
            after = memoryview(changed.flatten().view(torch.uint8).numpy())
        done = 0
        while done < len(after):
            done += os.pwrite(written.fileno(), after[done:], span.begin + done)
        return before, after

    waiting: deque[Future[tuple[memoryview, memoryview]]] = deque()
    with files.open_regular(source) as read, target.open("wb", buffering=0) as written, _threads() as (pool, count):
        at = begun = 0

        def next_copied() -> tuple[memoryview, memoryview]:
            nonlocal at, begun
            before, after = waiting.popleft().result()
            at += len(after)
            if at - begun >= WRITTEN_TOGETHER:
                begin_writing(written.fileno(), begun, at)
                begun = at
            return before, after

        for span in spans(os.fstat(read.fileno()).st_size, targets):
            waiting.append(pool.submit(copy, span))
            if len(waiting) > 2 * count:
                yield next_copied()
        while waiting:
            yield next_copied()


def begin_writing(descriptor: int, begin: int, end: int) -> None:
    """Have the kernel write bytes of a file to the disk while others are computed, rather than all at the end."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)  # keeps what is not yet written


@contextmanager
def _threads() -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """As many threads as PyTorch uses for one operation, and their count. There an operation uses only its thread."""
    import torch

    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool, count
    finally:
        torch.set_num_threads(count)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of floating-point numbers has no NaN and no infinity. Makes no copy of it."""
    import torch

    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # NaN if any element is
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _shards(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The shards of a folder by name, and the shard of each tensor if there is an index."""
    index = folder / INDEX
    indexed = shards_in(regular_file(folder, INDEX)) if os.path.lexists(index) else {}
    single = os.path.lexists(folder / WEIGHTS)
    if indexed and single:
        raise UserError(
            f"has both {WEIGHTS} and {INDEX}", where=str(folder), fix="Delete the one that is not the model's."
        )
    if not indexed and not single:
        raise UserError(
            f"has neither {WEIGHTS} nor {INDEX}", where=str(folder), fix="Pass a model folder with safetensors."
        )
    return {name: regular_file(folder, name) for name in sorted(set(indexed.values()) or {WEIGHTS})}, indexed
