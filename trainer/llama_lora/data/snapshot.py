"""Copy the base model to the workspace, from the Hub, a folder or a GGUF file, as safetensors with a tokenizer."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora import library_versions
from llama_lora.config import Model, Verify
from llama_lora.data.hub_errors import translate_hub_errors
from llama_lora.data.resolve import IGNORED_FILES, Source, snapshot_files
from llama_lora.data.shared_folders import make_once
from llama_lora.safetensors_files import stored_tensors

TOKENIZER_FILES = ["*token*", "*.json", "*.jinja", "vocab*", "merges.txt"]

log = logging.getLogger(__name__)


def take_snapshot(model: Model, source: Source, models: Path, verify: Verify = "cached") -> Path:
    """Return the base model's folder MODELS/NAME@REVISION, and make it if it is not complete.

    Raises UserError if the source has no usable model.
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
    return target


def tokenizer_folder(model: Model, folder: Path) -> Path:
    """A folder with the model's tokenizer and configs, without weights: the model's own, or one made in ``folder``.

    Raises UserError if the model or its tokenizer is not found.
    """
    if not model.path:
        from huggingface_hub import snapshot_download

        with translate_hub_errors("model.id", model.id):
            return Path(snapshot_download(model.id, revision=model.revision or None, allow_patterns=TOKENIZER_FILES))
    path = Path(model.path)
    if path.suffix == ".gguf" and path.is_file():
        from transformers import AutoConfig

        with _translate_gguf_errors(path):
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        _gguf_tokenizer(path, config).save_pretrained(folder)
        return folder
    if not path.is_dir():
        raise UserError(
            f"{path} is neither a folder nor a .gguf file", where="model.path", fix="Write the path of one of these."
        )
    return path


@contextmanager
def _resumable_folder(target: Path) -> Iterator[Path]:
    """Like files.whole_folder, but keep the files of a download that was killed: 16 GB take long."""
    folder = target.with_name(f".{target.name}.download")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # written by the Hub's client
    files.settle(folder)
    if target.exists():  # but incomplete
        shutil.rmtree(target)
    folder.rename(target)


def _download(repository: str, commit: str, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    with translate_hub_errors("model", repository):
        snapshot_download(repository, revision=commit, local_dir=folder, ignore_patterns=IGNORED_FILES)


def _copy(origin: Path, folder: Path) -> None:
    if not origin.is_dir():
        raise UserError(
            f"{origin} is neither a folder nor a .gguf file", where="model.path", fix="Write the path of one of these."
        )
    for name, file in snapshot_files(origin).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)


def _convert_gguf(file: Path, folder: Path) -> None:
    """Dequantize a GGUF file to bf16 safetensors, with its tokenizer and chat template."""
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    with _translate_gguf_errors(file):
        model = library_versions.load_gguf_model(file, torch.bfloat16)
    tokenizer = _gguf_tokenizer(file, model.config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _translate_gguf_errors(file: Path) -> Iterator[None]:
    """Turn any exception into a UserError: a damaged file can raise IndexError, KeyError, ..."""
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
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
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
    if not (folder / "config.json").is_file():
        raise UserError(f"{origin} has no config.json", where="model", fix="Use a model in the Hugging Face format.")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{origin} has no *.safetensors weights",
            where="model",
            fix="Convert it: AutoModelForCausalLM...save_pretrained(FOLDER).",
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise UserError(f"{origin} has no tokenizer", where="model", fix="Add the tokenizer's files to the folder.")
    missing = sorted(_parameters(folder, origin) - stored_tensors(folder).keys())
    if missing:  # transformers would initialize them at random
        raise UserError(f"{origin} lacks weights: {', '.join(missing[:3])}", where="model", fix="Use a complete copy.")


def _parameters(folder: Path, origin: str) -> set[str]:
    """The parameter names of the model's architecture. A shared one (tied embeddings) has one name."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (ValueError, OSError, KeyError) as error:
        raise UserError(
            f"transformers does not support {origin} as a causal language model: {str(error).splitlines()[0]}",
            where="model",
            fix="Use a Llama, or another causal language model.",
        ) from None
    return {name for name, _ in model.named_parameters()}
