"""Files that a stranger may have written: pickles that leave a mark when they are loaded, headers of any content."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch


class Mark:
    """A folder that exists as soon as one of the pickles below has been loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder = folder
        monkeypatch.setenv("MARK", str(folder))

    @property
    def left(self) -> bool:
        return self.folder.exists()


class Evil:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["MARK"],)


def evil_files() -> dict[str, bytes]:
    """The same pickle in every form that a library may load it from."""
    torch_file, old_torch_file = io.BytesIO(), io.BytesIO()
    torch.save({"a": Evil()}, torch_file)
    torch.save({"a": Evil()}, old_torch_file, _use_new_zipfile_serialization=False)
    return {"pickle": pickle.dumps(Evil()), "torch": torch_file.getvalue(), "old torch": old_torch_file.getvalue()}


def write_header(file: Path, header: Any, data: bytes = b"") -> Path:
    """Write a safetensors file with this header, as an object or as text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file
