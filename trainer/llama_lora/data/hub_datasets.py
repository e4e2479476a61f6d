"""Read datasets of the Hub, and folders that `datasets` wrote with save_to_disk."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from genvalues.common.errors import UserError
from genvalues.common.json_files import InvalidJson, read_object
from genvalues.common.text import one_line
from genvalues.settings.dataset_files import CHAINED, is_chained
from genvalues.settings.datasets import SplitPart, split_parts
from llama_lora.data.arrow_rows import BATCH_BYTES, MOST_ROWS, read_parquet, rows_of
from llama_lora.data.hub_errors import translate_dataset_errors
from llama_lora.data.parts import Part
from llama_lora.data.rows import BadRows, Row
from llama_lora.data.splits import Split, choose


def read_hub(part: Part, commit: str, bad_rows: BadRows) -> Iterator[Row]:
    """Yield the rows of a Hub dataset at a commit, as `datasets` reads it."""
    from datasets import get_dataset_config_names, get_dataset_split_names, load_dataset

    name = part.source
    with translate_dataset_errors(part.key, name):
        configs = get_dataset_config_names(name, revision=commit)
        config = choose(f"{part.key}.config", name, part.config, configs)
        splits = get_dataset_split_names(name, config, revision=commit)
        for each in split_parts(part.split) or [SplitPart("train")]:
            choose(f"{part.key}.split", name, each.name, splits)
        split = part.split or "train"
        rows = load_dataset(name, config, split=split, revision=commit)
    yield from _rows(rows, f"{name} {split}", bad_rows, part)


def parquet_export(part: Part, commit: str) -> dict[str, Split]:
    """The splits of the branch refs/convert/parquet, on which the Hub keeps each dataset as CONFIG/SPLIT/0000.parquet.

    See https://huggingface.co/docs/dataset-viewer/parquet. A split of which only the beginning is there is called
    partial-SPLIT.
    """
    from huggingface_hub import HfApi, hf_hub_download

    name = part.source
    with translate_dataset_errors(part.key, name):
        listed = HfApi().list_repo_files(name, revision=commit, repo_type="dataset")
    found: dict[str, dict[str, list[str]]] = {}
    for file in sorted(listed):
        if file.endswith(".parquet") and file.count("/") == 2:
            config, split, _ = file.split("/")
            found.setdefault(config, {}).setdefault(split, []).append(file)
    if not found:
        raise UserError(f"{name} has no Parquet files", where=f"{part.key}.revision", fix="Choose another revision.")
    splits = found[choose(f"{part.key}.config", name, part.config, list(found))]

    def read(split: str, bad_rows: BadRows) -> Iterator[Row]:
        for file in splits[split]:
            with translate_dataset_errors(part.key, name):
                path = Path(hf_hub_download(name, file, revision=commit, repo_type="dataset"))
            yield from read_parquet(path, f"{name} {file}", bad_rows, part.read_columns)

    return {split: partial(read, split) for split in splits}


def saved_splits(part: Part, folder: Path) -> dict[str, Split]:
    """The splits of a folder written by save_to_disk; a single dataset is the split train."""
    from datasets import DatasetDict, load_from_disk

    with translate_dataset_errors(part.key, part.source):
        if is_chained(folder):
            raise UserError(f"{CHAINED}: {folder.absolute()}", where=f"{part.key}.source", fix="Rename the folder.")
        check_inside(folder, f"{part.key}.source")
        loaded = load_from_disk(str(folder.absolute()))  # a relative path could begin with a protocol, such as file:
    splits = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}

    def read(name: str, bad_rows: BadRows) -> Iterator[Row]:
        yield from _rows(splits[name], f"{part.source} {name}", bad_rows, part)

    return {name: partial(read, name) for name in splits}


def check_inside(folder: Path, where: str) -> None:
    """Raise UserError if a folder of save_to_disk names files or splits outside of itself: they are read, too."""
    for file in (folder / "dataset_dict.json", folder / "state.json", *folder.glob("*/state.json")):
        try:
            content = read_object(file)
        except InvalidJson:  # datasets tells what it needs
            continue
        listed = [*as_list(content.get("splits")), *as_list(content.get("_data_files"))]
        names = [each.get("filename") if isinstance(each, dict) else each for each in listed]
        if outside := [name for name in names if isinstance(name, str) and leaves_folder(name)]:
            what = f"{file} names {one_line(outside[0])!r}, which leads out of the folder"
            raise UserError(what, where=where, fix="Write the dataset again with save_to_disk.")


def leaves_folder(name: str) -> bool:
    return "/" in name or "::" in name or name in ("", ".", "..")  # for ::, see is_chained


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _rows(dataset: Any, name: str, bad_rows: BadRows, part: Part) -> Iterator[Row]:
    """Yield the rows of a `datasets` dataset from its Arrow data, so that images and audio are not decoded."""
    table, number = dataset.with_format("arrow"), 0
    average = max(1, dataset.data.nbytes // max(1, len(dataset.data)))
    for batch_table in table.iter(max(1, min(MOST_ROWS, BATCH_BYTES // average))):
        for batch in batch_table.to_batches():
            yield from rows_of(batch, name, number, bad_rows, part.read_columns)
            number += batch.num_rows
