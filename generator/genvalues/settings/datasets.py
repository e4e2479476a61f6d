"""Kinds of dataset sources, and the columns of each row format."""

from __future__ import annotations

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
FILES = f"(supported files: {' '.join(FILE_SUFFIXES)})"
# Suffixes of files that the stages cannot read. A Hub id could end with one, but hardly any does.
OTHER_SUFFIXES = (
    *(".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"),
    *(
        ".tsv",
        ".ndjson",
        ".jsonlines",
        ".arrow",
        ".feather",
        ".orc",
        ".avro",
        ".pq",
        ".xls",
        ".xlsx",
        ".npy",
        ".npz",
        ".h5",
    ),
    *(".xml", ".html", ".yaml", ".yml", ".md", ".pdf", ".log", ".db", ".sqlite", ".pkl"),
)
MODEL_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt", ".pth")
REQUIRED_COLUMNS = {
    "text": ["text"],
    "instruction": ["instruction", "output"],
    "prompt-completion": ["prompt", "completion"],
    "chat": ["messages"],
}
OPTIONAL_COLUMNS = {"instruction": ["input"]}


def is_file(source: str) -> bool:
    return source.endswith(FILE_SUFFIXES) and not source.startswith("s3://")


def row_format(format_: str | None, source: str) -> str:
    return format_ or ("text" if source.endswith(".txt") else "instruction")


def is_on_hub(source: str) -> bool:
    return not source.startswith("s3://") and not is_file(source)
