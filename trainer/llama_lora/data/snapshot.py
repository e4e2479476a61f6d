"""Copy the base model to the workspace, from the Hub, a folder or a GGUF file, as safetensors with a tokenizer."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora import library_versions
from llama_lora.config import Model, Verify
from llama_lora.data.hub_errors import translate_hub_errors
from llama_lora.data.resolve import Source
from llama_lora.data.shared_folders import make_once
from llama_lora.model_files import (
    COMPLETE,
    CONFIG,
    INDEX,
    KEPT,
    WEIGHTS,
    base_files,
    check_folder,
    check_names,
    has_tokenizer,
    kept,
    read_config,
    shards_in,
    weight_index,
)
from llama_lora.safetensors_files import DTYPES, is_same, stored_tensors

log = logging.getLogger(__name__)

LAYER = re.compile(r"(.*?\.)(\d+)\.")  # how a tensor's name begins, if it is of a layer


def take_snapshot(model: Model, source: Source, models: Path, verify: Verify = "cached") -> Path:
    """Return the base model's folder MODELS/NAME@REVISION, and make it if it is not complete.

    It gets the files that ``model_files`` names. Raises UserError if the source has no usable model.
    """
    target = models / f"{source.name}@{source.revision[:12]}"
    with make_once(target, verify) as missing:
        if missing:
            log.info(f"copying the model {model.id or model.path} to {target}")
            if model.path:
                with files.whole_folder(target) as folder:
                    fill = _convert_gguf if model.path.endswith(".gguf") else _copy
                    fill(Path(model.path), folder)
                    _check(folder, model.path)
            else:
                with _resumable_folder(target) as folder:
                    _download(model.id, source.revision, folder)
                    _check(folder, model.id)
        else:  # another run's, or of an earlier release
            check_folder(target)
    return target


def tokenizer_folder(model: Model, folder: Path) -> Path:
    """A folder with the model's tokenizer and configs, without weights: the model's own, or one made in ``folder``.

    Raises UserError if the model or its tokenizer is not found.
    """
    if not model.path:
        from huggingface_hub import snapshot_download

        with translate_hub_errors("model.id", model.id):
            return Path(snapshot_download(model.id, revision=model.revision or None, allow_patterns=[*KEPT]))
    path = Path(model.path)
    if path.suffix == ".gguf" and path.is_file():
        with _alone(path) as file:
            with _translate_gguf_errors(path):
                config = library_versions.load_config(file.parent, gguf_file=file.name)
            _gguf_tokenizer(file, config).save_pretrained(folder)
        return folder
    if not path.is_dir():
        raise UserError(
            f"{path} is neither a folder nor a .gguf file", where="model.path", fix="Write the path of one of these."
        )
    return path


@contextmanager
def _resumable_folder(target: Path) -> Iterator[Path]:
    """Like files.whole_folder, but keep the files of a download that was killed: they may be gigabytes."""
    folder = target.with_name(f".{target.name}.download")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # written by the Hub's client
    files.settle(folder)
    if target.exists():  # but incomplete
        shutil.rmtree(target)
    folder.rename(target)


def _download(repository: str, commit: str, folder: Path) -> None:
    from huggingface_hub import HfApi, snapshot_download

    def fetch(names: list[str]) -> None:
        with translate_hub_errors("model", repository):
            snapshot_download(repository, revision=commit, local_dir=folder, allow_patterns=names)

    with translate_hub_errors("model", repository):
        available = set(HfApi().list_repo_files(repository, revision=commit))
    check_names(available, repository)
    names, index = kept(available), weight_index(available)
    fetch([*names, index] if index else names)
    weights = sorted(set(shards_in(folder / index).values())) if index else sorted(available & {WEIGHTS})
    if missing := sorted(set(weights) - available):
        raise UserError(f"{repository} has no {missing[0]}, but its {INDEX} lists it", where="model", fix=COMPLETE)
    if weights:
        fetch(weights)
    expected = {*names, *weights, *([index] if index else [])}
    for file in folder.rglob("*"):  # of a download by another release
        name = file.relative_to(folder).as_posix()
        if not file.is_dir() and name not in expected and not name.startswith(".cache/"):
            file.unlink()


def _copy(origin: Path, folder: Path) -> None:
    if not origin.is_dir():
        raise UserError(
            f"{origin} is neither a folder nor a .gguf file", where="model.path", fix="Write the path of one of these."
        )
    for name, file in base_files(origin).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)


def _convert_gguf(file: Path, folder: Path) -> None:
    """Dequantize a GGUF file to bf16 safetensors, with its tokenizer and chat template."""
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    with _alone(file) as alone:
        with _translate_gguf_errors(file):
            model = library_versions.load_gguf_model(alone, torch.bfloat16)
        tokenizer = _gguf_tokenizer(alone, model.config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """The file in a folder of its own: transformers also reads the files beside it, such as adapter_config.json."""
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, "model.gguf")
        link.symlink_to(file.absolute())
        yield link


@contextmanager
def _translate_gguf_errors(file: Path) -> Iterator[None]:
    """Turn any exception into a UserError: a damaged file can raise IndexError, KeyError, ..."""
    library_versions.import_models()
    library_versions.import_tokenizers()
    try:
        yield
    except Exception as error:
        raise UserError(
            f"transformers cannot read it as GGUF: {error}",
            where=str(file),
            fix="Download it again, or use safetensors.",
        ) from None


def _gguf_tokenizer(file: Path, config: Any) -> Any:
    """Load the tokenizer of a GGUF file. ``config`` is that of its model."""
    from transformers import AutoTokenizer

    with _translate_gguf_errors(file):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, **library_versions.LOCAL)
    # transformers 4.57 uses default special tokens instead of the file's: SmolLM2's end-of-sequence token becomes
    # <|im_start|>, and training would use the wrong one. The model's config has the right ids.
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token_id = getattr(config, f"{name}_id", None)
        if token_id is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
    begin = _begins_texts(file)
    if begin is not None and tokenizer.bos_token:
        library_versions.begin_texts(tokenizer, begin)
    return tokenizer


def _begins_texts(file: Path) -> bool | None:
    """Whether a GGUF file's tokenizer puts the beginning-of-sequence token before a text; None if it does not tell.

    The key: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. transformers does not read it.
    """
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("tokenizer.ggml.add_bos_token")
    return None if field is None else bool(field.contents())


def _check(folder: Path, origin: str) -> None:
    """Raise UserError for a model that a later stage could not use: this stage is the cheapest place to fail."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{origin} has no {CONFIG}", where="model", fix="Use a model in the Hugging Face format.")
    if not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        raise UserError(
            f"{origin} has no *.safetensors weights ({WEIGHTS} or {INDEX})",
            where="model",
            fix="Convert it: AutoModelForCausalLM...save_pretrained(FOLDER).",
        )
    if not has_tokenizer(folder):
        raise UserError(f"{origin} has no tokenizer", where="model", fix="Add the tokenizer's files to the folder.")
    stored = stored_tensors(folder)
    needed, shared = _parameters(folder, origin, len(stored))
    if missing := sorted(needed.keys() - stored.keys()):  # transformers would initialize them at random
        raise UserError(f"{origin} lacks weights: {', '.join(missing[:3])}", where="model", fix=COMPLETE)
    if unused := of_other_layers(stored.keys() - needed.keys(), needed):
        what = f"{origin} has the weights {', '.join(unused[:3])} of a layer that its {CONFIG} does not have"
        raise UserError(what, where="model", fix=f"Use the {CONFIG} that belongs to the weights.")
    for name, shape in needed.items():
        if stored[name].shape != shape:
            what = f"{name} of {origin} has shape {stored[name].shape}, but its {CONFIG} needs {shape}"
            raise UserError(what, where="model", fix=COMPLETE)
        if stored[name].dtype not in DTYPES:
            what = f"{name} of {origin} has dtype {stored[name].dtype}"
            raise UserError(what, where="model", fix=f"Use a model in {', '.join(DTYPES)}.")
    for name, first in shared.items():  # transformers 5 unties them if both are stored and differ
        if name in stored and not is_same(folder, stored[name], stored[first]):
            what = f"{name} of {origin} differs from {first}, but its {CONFIG} has tie_word_embeddings true"
            fix = f"Set tie_word_embeddings to false in the {CONFIG} of a copy, and use its path."
            raise UserError(what, where="model", fix=fix)


def of_other_layers(unused: Iterable[str], needed: Iterable[str]) -> list[str]:
    """The unused tensors of further layers: named as the needed ones, with a number that none of these has.

    Other unused tensors are usual, such as rotary_emb.inv_freq and the lm_head of tied embeddings.
    """
    layers = {match.groups() for match in map(LAYER.match, needed) if match}
    lists = {name for name, _ in layers}
    found = ((name, match.groups()) for name in unused if (match := LAYER.match(name)))
    return sorted(name for name, layer in found if layer not in layers and layer[0] in lists)


def _parameters(folder: Path, origin: str, most_layers: int) -> tuple[dict[str, list[int]], dict[str, str]]:
    """The shapes of the parameters of the model's architecture, and the first name of each that has another one.

    A parameter has several names if it is shared (tied embeddings).

    ``most_layers``: how many tensors there are. Each layer has some; a config of more layers could take hours to build.
    """
    written = read_config(folder, origin)
    layers = written.get("num_hidden_layers")
    if isinstance(layers, (int, float)) and layers > most_layers:
        what = f"{CONFIG} of {origin} has num_hidden_layers {layers:g}, but there are only {most_layers} weights"
        raise UserError(what, where="model", fix=COMPLETE)
    library_versions.import_models()  # an error of the installation or of a variable is not one of the model
    try:
        model = library_versions.empty_model(library_versions.load_config(folder))
    except Exception as error:  # a config can make any line of transformers fail
        lines = str(error).splitlines() or [type(error).__name__]
        own = ", and the code that it comes with (auto_map) is not run" if "auto_map" in written else ""
        raise UserError(
            f"transformers does not support {origin} as a causal language model{own}: {lines[0]}",
            where="model",
            fix="Use a Llama, or another causal language model.",
        ) from None
    names = {parameter: name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    shared = {name: names[parameter] for name, parameter in every if name != names[parameter]}
    return {name: list(parameter.shape) for parameter, name in names.items()}, shared
