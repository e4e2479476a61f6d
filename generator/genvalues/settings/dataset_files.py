"""The files of a source that is a file, a folder, a glob or an S3 prefix, and the split that each belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from glob import iglob
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

from genvalues.common.errors import UserError
from genvalues.settings.datasets import FILES, file_format, is_glob, is_path

# The words in names of files and folders that say which split they are. The same as those of `datasets`:
# https://huggingface.co/docs/datasets/repository_structure
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of `datasets`, no rows
SAVED = ("dataset_dict.json", "state.json")  # a folder that save_to_disk of `datasets` wrote has one of these
CHAINED = "its path contains ::, which the library datasets cannot open"  # see is_chained

MOST_FILES = 200_000  # in a source, and its folders
Name = TypeVar("Name", str, Path)


class DataFile(NamedTuple):
    """A data file: its path, and its name within the source (empty for a source that is one file)."""

    name: str
    path: Path


def exists_here(source: str) -> bool:
    """Whether a source is on this machine: a path, or something that exists, which is never a Hub id."""
    return is_path(source) or (bool(source) and "://" not in source and Path(source).exists())


def is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote this folder with save_to_disk."""
    return any((folder / name).is_file() for name in SAVED)


def is_chained(folder: Path) -> bool:
    """Whether `datasets` opens another folder than this one: fsspec cuts a path at ::, as a chain of URLs."""
    return "::" in str(folder.absolute())


def files_of(source: str) -> list[DataFile]:
    """The files of a local source, in the order of their names; empty if nothing is there.

    Raises UserError at the source if what is there has no data file.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if not file_format(path.name):
            raise UserError("has an unsupported file format", where=source, fix=FILES)
        return [DataFile("", path)]
    if path.is_dir():
        saved = is_saved(path)
        names = sorted(_at_most(path.rglob("*"), source))
        _check_links(file for file in names if _is_data(file, path))
        found = [file for file in names if file.is_file() and (saved or _is_data(file, path))]
        files = [DataFile(file.relative_to(path).as_posix(), file) for file in found]
        if not files:
            raise UserError("the folder has no data file", where=source, fix=f"Name a folder that has one. {FILES}")
        return files
    if not is_glob(source):
        return []
    paths = _at_most(iglob(str(path), recursive=True), source)  # noqa: PTH207 - Path.glob reads no absolute pattern
    matches = sorted(map(Path, paths))
    _check_links(file for file in matches if file_format(file.name))
    above = Path(*path.parts[: next(index for index, part in enumerate(path.parts) if is_glob(part))])
    files = [
        DataFile(file.relative_to(above).as_posix(), file)
        for file in matches
        if file.is_file() and file_format(file.name)
    ]
    if matches and not files:
        raise UserError("matches no data file", where=source, fix=FILES)
    return files


def _at_most(names: Iterable[Name], source: str) -> list[Name]:
    """Raise UserError for a source with very many files, such as /, instead of listing them."""
    found = list(islice(names, MOST_FILES + 1))
    if len(found) > MOST_FILES:
        raise UserError(
            f"has more than {MOST_FILES:,} files", where=source, fix="Name a folder with the data files alone."
        )
    return found


def _check_links(files: Iterable[Path]) -> None:
    """Raise UserError for a link to a missing file, whose rows would be left out silently."""
    for file in files:
        if file.is_symlink() and not file.exists():
            raise UserError("is a link to a file that does not exist", where=str(file), fix="Restore or remove it.")


def _is_data(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
    return not hidden and file.name not in METADATA and bool(file_format(file.name))


def s3_keys(pattern: str, keys: Iterable[str]) -> list[str]:
    """The keys of data files under a prefix, or that match a glob (in which * matches slashes, too)."""
    wild = is_glob(pattern)
    names = (key for key in keys if file_format(key) and (not wild or fnmatchcase(key, pattern)))
    return sorted(name for name in names if not PurePosixPath(name).name.startswith((".", "_")))


Named = TypeVar("Named", bound=tuple)


def by_split(files: Sequence[Named]) -> dict[str, list[Named]]:
    """Files by split, as their names (the first item) say: of the last folder or name with a word for one, else train.

    A glob or a list of files without such words is all of train.
    """
    splits: dict[str, list[Named]] = {}
    for file in files:
        words = [word for part in reversed(file[0].split("/")) for word in re.split(r"[-._ 0-9]+", part.lower())]
        split = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train")
        splits.setdefault(split, []).append(file)
    return splits
