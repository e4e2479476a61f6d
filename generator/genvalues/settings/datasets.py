"""What a dataset source is, and which columns each row format has."""

from __future__ import annotations

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
FILES = f"(files end with {' '.join(FILE_SUFFIXES)})"
# Ends of files that no stage reads, which a hub id could have and hardly any has.
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
