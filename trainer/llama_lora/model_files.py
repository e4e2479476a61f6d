"""The files of a base model: which of a folder's or repository's files are read, and which are refused by name.

A model folder is what a stranger may have written. transformers follows an adapter_config.json to another model, runs
a repository's Python, unpickles weights, and takes weights from wherever its config names them; so only the files named
here are copied to the workspace, and a folder with a file that changes what is loaded is refused.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from genvalues.common.errors import UserError
from genvalues.common.json_files import InvalidJson, JsonNotFound, read_object
from genvalues.common.text import one_line

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
# What a tokenizer is loaded from, and the chat templates (transformers keeps further ones in the folder).
TOKENIZER_FILES = (
    *(*TOKENIZERS, "tokenizer.model.*", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("spiece.model", "sentencepiece*.model", "*.tiktoken"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
SETTINGS = (CONFIG, GENERATION_CONFIG)
LICENSES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
KEPT = (*SETTINGS, *TOKENIZER_FILES, *LICENSES)
FOLDERS = frozenset(pattern.partition("/")[0] for pattern in KEPT if "/" in pattern)
# Files from which a loader would take another model's weights, or an adapter's besides the model's own.
ADAPTER = re.compile(r"adapter_(config\.json|model(-.*)?\.(safetensors|bin)(\.index\.json)?)")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,254}")  # of a shard: no folder, no option, no wildcard
NO_LINKS = "Use a folder with files, such as a copy (cp -rL)."
COMPLETE = "Use a complete copy."
# Numbers of config.json that are divisors, or under a root or a logarithm. Others than positive ones, and those that
# fp32 has not, make NaN.
POSITIVE_KEYS = """
rope_theta rope_local_base_freq factor short_factor long_factor low_freq_factor high_freq_factor attention_factor
partial_rotary_factor original_max_position_embeddings rms_norm_eps layer_norm_eps initializer_range
"""
POSITIVE = frozenset(POSITIVE_KEYS.split())
COPY_AGAIN = "Copy the file again from its source."


def check_names(names: Iterable[str], origin: str) -> None:
    """Raise UserError for the first file that makes ``origin`` something else than a base model."""
    for name in sorted(names):
        if ADAPTER.fullmatch(name):
            raise UserError(
                f"{origin} has {name}: it is an adapter, or a model with one, and not a base model",
                where="model",
                fix="Merge the adapter first (`llama-lora merge`) and use the result, or use a copy without its files.",
            )


def kept(names: Collection[str]) -> list[str]:
    """The files besides the weights that are read, of all ``names`` in a folder or repository.

    LICENSE* also matches names that are not UTF-8, which a stage cannot print.
    """
    return sorted(
        name
        for name in names
        if any(fnmatchcase(name, each) for each in KEPT) and name.count("/") == _depth(name) and name.isprintable()
    )


def _depth(name: str) -> int:
    return 1 if name.partition("/")[0] in FOLDERS else 0


def has_tokenizer(model: Path) -> bool:
    """Whether a model folder has a file that a tokenizer is loaded from."""
    return any((model / name).is_file() for name in TOKENIZERS)


def weight_index(names: Collection[str]) -> str | None:
    """The index that names the shards; None if the model is one file.

    A model.safetensors comes first, as for transformers.
    """
    return INDEX if INDEX in names and WEIGHTS not in names else None


def shards_in(index: Path) -> dict[str, str]:
    """Map each tensor's name to its shard, as an index says. Raises UserError if a shard is not a plain file name."""
    try:
        listed = read_object(index).get("weight_map")
    except InvalidJson as problem:
        raise UserError(str(problem), where=str(index), fix=COMPLETE) from None
    if not isinstance(listed, dict) or not listed:
        raise UserError("has no weight_map", where=str(index), fix=COMPLETE)
    for name, shard in listed.items():
        if not isinstance(shard, str) or not PLAIN_NAME.fullmatch(shard) or not shard.endswith(".safetensors"):
            raise UserError(
                f"{name} is in {shard!r}, which is not the name of a *.safetensors file in this folder",
                where=str(index),
                fix=COMPLETE,
            )
    return listed


def base_files(folder: Path) -> dict[str, Path]:
    """The files of a model folder that are read, by name relative to it, each with the file to open.

    Other files are ignored. A link is refused, except for those of the Hub client's cache, which are followed to their
    files. Raises UserError.
    """
    try:
        found = set(os.listdir(folder))  # noqa: PTH208 - names
        inner = {name for name in FOLDERS & found if (folder / name).is_dir()}
        found |= {f"{name}/{file}" for name in inner for file in os.listdir(folder / name)}  # noqa: PTH208 - names
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(folder), fix="Check its permissions.") from None
    check_names(found, str(folder))
    for name in inner:
        if (folder / name).is_symlink():
            raise UserError("is a symbolic link", where=str(folder / name), fix=NO_LINKS)
    names = kept(found)
    if (index := weight_index(found)) is not None:
        names += [index, *sorted(set(shards_in(regular_file(folder, index)).values()))]
    elif WEIGHTS in found:
        names.append(WEIGHTS)
    return {name: regular_file(folder, name) for name in sorted(names, key=Path)}


def regular_file(folder: Path, name: str) -> Path:
    """The file to open for a name in a model folder. Raises UserError if there is none, or another kind of file."""
    file = folder / name
    try:
        status = os.lstat(file)
        if stat.S_ISLNK(status.st_mode):
            file = _in_hub_cache(folder, file)
            status = os.lstat(file)
    except FileNotFoundError:
        raise UserError("not found, but the index lists it", where=str(file), fix=COMPLETE) from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError("is not a regular file", where=str(file), fix="Use a folder with files only.")
    return file


def _in_hub_cache(folder: Path, link: Path) -> Path:
    """The file of a link in models--X/snapshots/REVISION to models--X/blobs.

    See https://huggingface.co/docs/huggingface_hub/guides/manage-cache. Raises UserError for any other link.
    """
    snapshot = Path(os.path.realpath(folder))
    repository, blob = snapshot.parent.parent, Path(os.path.realpath(link))
    in_cache = snapshot.parent.name == "snapshots" and repository.name.startswith("models--")
    if in_cache and blob.parent == repository / "blobs":
        return blob
    raise UserError("is a symbolic link", where=str(link), fix=NO_LINKS)


def read_config(folder: Path, origin: str) -> dict[str, Any]:
    """Read config.json.

    Raises UserError if it cannot be read, names other weights, which transformers 5 loads, or has a number that makes
    NaN.
    """
    try:
        config = read_object(folder / CONFIG)
    except InvalidJson as problem:
        raise UserError(f"{CONFIG} of {origin} {problem}", where="model", fix=COMPLETE) from None
    if config.get("transformers_weights") is not None:
        raise UserError(
            f"{CONFIG} of {origin} names other weights (transformers_weights)",
            where="model",
            fix=f"Use a model with {WEIGHTS} or {INDEX}.",
        )
    for key, value in not_positive(config):
        what = (
            f"{CONFIG} of {origin} has {key} {one_line(repr(value))}, which must be a positive number (1e-30 to 1e30)"
        )
        raise UserError(what, where="model", fix=f"Use the {CONFIG} of the original model.")
    return config


def not_positive(config: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of a config, and of the objects in it, that must have positive numbers and have something else."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from not_positive(value, f"{above}{one_line(key)}.")
        elif key in POSITIVE and value is not None:
            for each in value if isinstance(value, list) else [value]:
                if not isinstance(each, (int, float)) or isinstance(each, bool) or not 1e-30 < each < 1e30:
                    yield f"{above}{key}", each


def check_folder(folder: Path) -> None:
    """Raise UserError for a model folder with a file that changes what transformers loads."""
    base_files(folder)
    read_config(folder, str(folder))


def read_model_json(file: Path) -> dict[str, Any]:
    """Read a file such as config.json; empty if there is none. Raises UserError if it is damaged."""
    try:
        return read_object(file)
    except JsonNotFound:
        return {}
    except InvalidJson as error:
        raise UserError(str(error), where=str(file), fix=COPY_AGAIN) from None
