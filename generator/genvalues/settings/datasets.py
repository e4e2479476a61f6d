"""Kinds of dataset sources, parts of splits, and the columns of each row format."""

from __future__ import annotations

import re
from typing import NamedTuple

FORMATS = {  # of files, by suffix
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
}
COMPRESSIONS = (".gz", ".zst")  # a second suffix; Parquet files are compressed inside
# First bytes (RFC 1952, RFC 8878). A Zstandard file may begin with a frame to skip, as those of pzstd do.
GZIP = b"\x1f\x8b"
ZSTANDARD = (b"\x28\xb5\x2f\xfd", *(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60)))
FILE_SUFFIXES = (*FORMATS, *(f"{suffix}{end}" for suffix in FORMATS if suffix != ".parquet" for end in COMPRESSIONS))
FILES = f"(supported files: {' '.join(FORMATS)}; all but .parquet also with .gz or .zst)"
# Suffixes of files that the stages cannot read. A Hub id could end with one, but hardly any does.
OTHER_SUFFIXES = (
    *(".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"),
    *(".jsonlines", ".arrow", ".feather", ".orc", ".avro", ".pq", ".xls", ".xlsx", ".npy", ".npz", ".h5"),
    *(".xml", ".html", ".yaml", ".yml", ".md", ".pdf", ".log", ".db", ".sqlite", ".pkl"),
)
MODEL_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt", ".pth")
REQUIRED_COLUMNS = {
    "text": ["text"],
    "instruction": ["instruction", "output"],
    "prompt-completion": ["prompt", "completion"],
    "chat": ["messages"],
}
OPTIONAL_COLUMNS = {
    "instruction": ["input", "system", "history"],
    "prompt-completion": ["tools"],
    "chat": ["system", "tools"],
}
# Columns that are read if the one named after the key is missing. First match wins.
COLUMN_ALIASES = {
    "instruction": ("question", "query"),
    "output": ("answer", "response"),
    "prompt": ("question",),
    "completion": ("answer", "response"),
    "messages": ("conversations", "conversation"),
}
COLUMNS = {name for columns in (REQUIRED_COLUMNS, OPTIONAL_COLUMNS) for names in columns.values() for name in names}

WILDCARD = re.compile(r"[*?\[]")
BOUND = r"(-?((100|[0-9]{1,2})%|[0-9]{1,15}))?"
SPLIT_PART = rf"[A-Za-z0-9_][A-Za-z0-9_.-]*(\[{BOUND}:{BOUND}\])?"
SPLIT = rf"{SPLIT_PART}( *\+ *{SPLIT_PART})*"  # as `datasets` reads it


def file_format(name: str) -> str:
    """The format of a file by its suffix, in any case; empty if it has none that is supported."""
    name = name.lower()
    return next((FORMATS[f".{suffix.split('.')[1]}"] for suffix in FILE_SUFFIXES if name.endswith(suffix)), "")


def on_s3(source: str) -> bool:
    return source.startswith("s3://")


# Names of buckets (S3 user guide, General purpose bucket naming rules), without the rarer rules.
BUCKET = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
BUCKET_RULES = "3 to 63 lower-case letters, digits, dots and hyphens, with a letter or digit at both ends"


def invalid_bucket(uri: str) -> str | None:
    """The bucket of an s3:// URI whose name S3 does not allow; None if it is allowed."""
    bucket = uri.removeprefix("s3://").partition("/")[0]
    return None if re.fullmatch(BUCKET, bucket) else bucket


def is_url(source: str) -> bool:
    """Whether this is the address of something on the web, which no stage reads."""
    return re.match(r"(?i)(https?|ftp)://", source) is not None


def hub_id_of(url: str, kind: str) -> str | None:
    """The Hub id in the address of a page of the Hugging Face Hub. ``kind``: models or datasets."""
    beginning = r"(?i)https?://(www\.)?(huggingface\.co|hf\.co)/" + (
        "datasets/" if kind == "datasets" else "(?!datasets/)"
    )
    matched = re.match(beginning + r"([^/?#]+/[^/?#]+)", url)
    return matched[3] if matched else None


def is_glob(source: str) -> bool:
    """Whether a source contains a wildcard, which a Hub id cannot."""
    return WILDCARD.search(source) is not None


def is_prefix(source: str) -> bool:
    """Whether a source names several files: it ends with a slash, or contains a wildcard."""
    return source.endswith("/") or is_glob(source)


def before_wildcard(source: str) -> str:
    return WILDCARD.split(source)[0]


def is_path(source: str) -> bool:
    """Whether a source can only be a file, a folder or a glob, by its text: a relative folder looks like a Hub id."""
    if not source or "://" in source:
        return False
    begins = source.startswith(("/", "./", "../", "~/")) or source in (".", "..")
    return begins or is_prefix(source) or bool(file_format(source))


def row_format(format_: str | None, source: str) -> str:
    return format_ or ("text" if file_format(source) == "text" else "instruction")


def is_on_hub(source: str) -> bool:
    return "://" not in source and not is_path(source)


class SplitPart(NamedTuple):
    """A split, or the part of it between two bounds: numbers of rows, or percentages; negative from the end."""

    name: str
    first: str = ""
    end: str = ""

    def bounds(self, rows: int) -> tuple[int, int]:
        """The first row (from 0) and the end of the part, of a split of so many rows. `datasets` rounds as well."""
        first, end = (
            round(int(bound[:-1]) * rows / 100) if bound.endswith("%") else int(bound)
            for bound in (self.first or "0", self.end or str(rows))
        )
        first, end = (max(0, bound + rows) if bound < 0 else min(bound, rows) for bound in (first, end))
        return first, max(first, end)

    def is_empty(self) -> bool:
        """Whether it has no row, however many the split has."""
        least = max((abs(int(bound.rstrip("%"))) for bound in (self.first, self.end) if bound), default=1)
        return all(first == end for first, end in map(self.bounds, (least, 10**16)))


def split_parts(split: str) -> list[SplitPart]:
    """The parts of a split that matches SPLIT: ``train[:10%]+test``."""
    parts = (re.match(r"([^\[]+)(?:\[(.*):(.*)\])?$", part.strip()) for part in split.split("+"))
    return [SplitPart(*(group or "" for group in part.groups())) for part in parts if part]
