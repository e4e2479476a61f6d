"""Read tensors from files of torch.save, without torch.load: nothing in the file can run code or name memory.

Such a file is a zip archive with a pickle (data.pkl) and one record of bytes for each storage (data/KEY). A pickle is a
program; the reader here knows the few operations and names that dictionaries of tensors are written with, and checks
each tensor against the record that it is a part of. torch.load(weights_only=True) restricts the names, too, but before
torch 2.10 a crafted file can corrupt its memory, and optimum-neuron needs torch 2.8:
https://github.com/pytorch/pytorch/security/advisories/GHSA-63cw-57p8-fm3p
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from genvalues.common import files
from genvalues.common.errors import UserError

TRAIN_AGAIN = "Use another checkpoint, or train again."
COPY_ALL = "Copy the whole checkpoint, or use another."
MOST_PICKLE_BYTES = 16 << 20  # of names and shapes; an adapter of an 80-layer model has 0.1 MB
MOST_DEPTH = 8
MOST_DIMENSIONS = 8
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip entry: signature, and the lengths of its name and extra field
DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
# What torch.save writes for mappings, lists, texts, numbers and tensors: https://docs.python.org/3/library/pickletools.html
OPERATION_NAMES = """
PROTO STOP MARK EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 SETITEM SETITEMS APPEND APPENDS
BINUNICODE BINFLOAT BININT BININT1 BININT2 LONG1 NONE NEWTRUE NEWFALSE BINPUT LONG_BINPUT BINGET LONG_BINGET
GLOBAL REDUCE NEWOBJ BUILD BINPERSID
"""
OPERATIONS = frozenset(OPERATION_NAMES.split())


class TensorReference:
    """The placeholder that torch_xla.utils.serialization writes for a tensor: ``tid`` is the N of tensor_N.pt."""

    __slots__ = ("tid",)
    tid: int

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or type(state.get("tid")) is not int or state["tid"] < 0:
            raise pickle.UnpicklingError("a reference without a number")
        self.tid = state["tid"]


# Tuples, because a pickle can set the attributes of other objects.
class _Storage(NamedTuple):
    """A record of the archive: its key, the dtype of its elements, and their number."""

    key: str
    dtype: torch.dtype
    elements: int


class _Tensor(NamedTuple):
    """A tensor in a storage: its first element, and shape and stride in elements."""

    storage: _Storage
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def load(path: Path) -> Any:
    """Read what torch.save wrote: mappings, lists, texts and numbers, with memory-mapped tensors and TensorReferences.

    Raises UserError if the file is damaged (torch writes checksums but does not verify them), or has other objects.
    """
    try:
        with files.open_regular(path) as file:
            archive = _Archive(file)
            content = _Unpickler(io.BytesIO(_checked_pickle(archive.records["data.pkl"]))).load()
            return _Filler(archive).filled(content, 0)
    except FileNotFoundError:
        raise UserError("shard not found", where=str(path), fix=COPY_ALL) from None
    except pickle.UnpicklingError as error:
        what = f"contains objects other than tensors; not loaded ({error})"
        raise UserError(what, where=str(path), fix=TRAIN_AGAIN) from None
    except UserError:
        raise
    except Exception as error:  # a pickle can make any line of the unpickler fail
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"file is damaged: {reason}", where=str(path), fix=TRAIN_AGAIN) from None


class _Archive:
    """The records of a file by their names below the archive's one folder, mapped. Their checksums are right.

    Raises ValueError or an error of zipfile if it is not an archive of torch.save.
    """

    def __init__(self, file: BinaryIO) -> None:
        # Copy on write: torch wants writable memory, and the file must not change.
        self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.records: dict[str, memoryview] = {}
        self.begins: dict[str, int] = {}
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        if sum(info.compress_size for info in entries) > len(self.map):
            raise ValueError("the records overlap")
        folders = {info.filename.partition("/")[0] for info in entries}
        for info in entries:
            name = info.filename.partition("/")[2]
            stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
            if name in self.records or len(folders) > 1 or not stored:
                raise ValueError(f"{info.filename!r} is not a record of torch.save")
            self.begins[name] = self._begin(info)
            self.records[name] = memoryview(self.map)[self.begins[name] : self.begins[name] + info.file_size]
            if zlib.crc32(self.records[name]) != info.CRC:
                raise ValueError(f"wrong checksum of {info.filename}")
        if self.records.get("byteorder", b"little") != b"little":
            raise ValueError("the tensors are not in little-endian order")

    def _begin(self, info: zipfile.ZipInfo) -> int:
        signature, name, extra = LOCAL_HEADER.unpack_from(self.map, info.header_offset)
        begin = int(info.header_offset + LOCAL_HEADER.size + name + extra)
        if signature != b"PK\3\4" or begin + info.file_size > len(self.map):
            raise ValueError(f"{info.filename} is cut off")
        return begin


def _checked_pickle(content: memoryview) -> bytes:
    """The pickle, of known operations only: others could allocate what they like, or call what they like."""
    if len(content) > MOST_PICKLE_BYTES:
        raise ValueError(f"data.pkl has {len(content)} bytes, the most is {MOST_PICKLE_BYTES}")
    for operation, argument, _ in pickletools.genops(bytes(content)):
        if operation.name not in OPERATIONS:
            raise pickle.UnpicklingError(f"operation {operation.name}")
        if operation.name == "LONG_BINPUT" and int(argument or 0) > len(content):  # Python makes its memo as long
            raise pickle.UnpicklingError(f"memo {argument}")
    return bytes(content)


class _Unpickler(pickle.Unpickler):
    """Knows seven kinds of storages and four names besides."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
            ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
            ("torch_xla.utils.serialization", "TensorReference"): TensorReference,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name}"[:200])
        return known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, elements = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str) or not _count(elements):
            raise pickle.UnpicklingError("a persistent id that is not of a storage")
        return _Storage(key, dtype, elements)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


class _RebuildTensor:
    """Called as torch._utils._rebuild_tensor_v2. An object without attributes, which a pickle cannot change."""

    __slots__ = ()

    def __call__(self, storage: Any, first: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
        shape, stride = tuple(shape), tuple(stride)
        numbers = (first, *shape, *stride)
        described = len(shape) == len(stride) <= MOST_DIMENSIONS and all(map(_count, numbers))
        if not isinstance(storage, _Storage) or not described:
            raise ValueError("a tensor is not described by numbers")
        last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if math.prod(shape) and last + 1 != math.prod(shape):  # a short record could be a long tensor
            raise ValueError("the elements of a tensor are not one after another")
        if first + math.prod(shape) > storage.elements:
            raise ValueError("a tensor is longer than its record")
        return _Tensor(storage, first, shape, stride)


class _RebuildParameter:
    """Called as torch._utils._rebuild_parameter."""

    __slots__ = ()

    def __call__(self, data: Any, *_: Any) -> Any:
        return data


class _Filler:
    """Puts tensors in the place of their descriptions. Two tensors never share bytes."""

    def __init__(self, archive: _Archive) -> None:
        self._archive = archive
        self._used: list[tuple[int, int]] = []
        self._filled: dict[int, Any] = {}  # by identity: an object may occur at many places

    def filled(self, value: Any, depth: int) -> Any:
        """The content of the pickle with tensors instead of their descriptions.

        Raises ValueError if it is nested too deeply, or contains itself.
        """
        if depth > MOST_DEPTH:
            raise ValueError("the content is nested too deeply")
        if id(value) not in self._filled:
            self._filled[id(value)] = self._fill(value, depth + 1)
        return self._filled[id(value)]

    def _fill(self, value: Any, depth: int) -> Any:
        if isinstance(value, _Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            return {key: self.filled(inner, depth) for key, inner in dict.items(value)}
        if type(value) in (list, tuple):
            return [self.filled(inner, depth) for inner in value]
        if value is None or type(value) in (str, int, float, bool, TensorReference):
            return value
        raise pickle.UnpicklingError(type(value).__name__)

    def _tensor(self, described: _Tensor) -> torch.Tensor:
        key = f"data/{described.storage.key}"
        dtype, count = described.storage.dtype, math.prod(described.shape)
        if len(self._archive.records[key]) != described.storage.elements * dtype.itemsize:
            raise ValueError(f"record {key} has another length than its tensors")
        if not count:
            return torch.empty(described.shape, dtype=dtype)
        begin = self._archive.begins[key] + described.first * dtype.itemsize
        if begin % dtype.itemsize:
            raise ValueError(f"record {key} is not aligned")
        self._use(begin, begin + count * dtype.itemsize)
        flat = torch.frombuffer(self._archive.map, dtype=dtype, count=count, offset=begin)
        return flat.as_strided(described.shape, described.stride)

    def _use(self, begin: int, end: int) -> None:
        if any(begin < other_end and other_begin < end for other_begin, other_end in self._used):
            raise ValueError("two tensors have the same bytes")
        self._used.append((begin, end))
