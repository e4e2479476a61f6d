"""Take the base model into the workspace: from the hub, a folder, or a GGUF file; always as safetensors + tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from genvalues import files
from genvalues.errors import UserError
from llama_lora.config import Model
from llama_lora.resolve import Source

# Weights in other formats (Meta's own consolidated.pth among them) would double the download and are never read.
NOT_TAKEN = ["original/*", "*.pth", "*.bin", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "onnx/*", "*.pt", "*.md", ".git*"]


def take_snapshot(model: Model, source: Source, models: Path) -> Path:
    """The base model's folder in the workspace, MODELS/NAME@REVISION; made only if it is not there yet.

    Raises UserError where the source holds no model that can be read.
    """
    target = models / f"{source.name}@{source.revision[:12]}"
    if target.exists():  # it was renamed into place, so it is whole
        return target
    print(f"taking the model {model.id or model.path} into {target}", flush=True)
    if not model.path:
        with _resumable_folder(target) as folder:
            _download(model.id, source.revision, folder)
            _check(folder, model.id)
        return target
    with files.whole_folder(target) as folder:
        if model.path.endswith(".gguf"):
            _convert_gguf(Path(model.path), folder)
        else:
            _copy(Path(model.path), folder)
        _check(folder, model.path)
    return target


@contextmanager
def _resumable_folder(target: Path) -> Iterator[Path]:
    """As files.whole_folder, but what a killed download has left is gone on with: 16 GB take long."""
    folder = target.with_name(f".{target.name}.download")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub client's own notes
    files.settle(folder)
    folder.rename(target)


def _download(repository: str, commit: str, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(repository, revision=commit, local_dir=folder, ignore_patterns=NOT_TAKEN)


def _copy(origin: Path, folder: Path) -> None:
    if not origin.is_dir():
        raise UserError(
            f"{origin} is neither a folder nor a .gguf file", where="model.path", fix="Write one of the two."
        )
    shutil.copytree(origin, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*NOT_TAKEN))


def _convert_gguf(file: Path, folder: Path) -> None:
    """Dequantize a GGUF file to bf16 safetensors, with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    except (ValueError, OSError) as error:
        raise UserError(f"transformers cannot read it as GGUF: {error}", where=str(file)) from None
    # transformers 4.57 takes the tokenizer's special tokens from a default, not from the file: SmolLM2's
    # end-of-sequence token becomes <|im_start|>, so it would be trained on the wrong one. The config has it right.
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token_id = getattr(model.config, f"{name}_id", None)
        if token_id is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check(folder: Path, origin: str) -> None:
    """Refuse a snapshot that no later stage could read, while it is cheap."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{origin} has no config.json", where="model", fix="Write a model in the Hugging Face format.")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{origin} has no *.safetensors weights",
            where="model",
            fix="Convert it: AutoModelForCausalLM...save_pretrained(FOLDER).",
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise UserError(
            f"{origin} has no tokenizer", where="model", fix="Put the tokenizer's files beside its config.json."
        )
