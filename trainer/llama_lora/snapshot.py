"""Take the base model into the workspace: from the hub, a folder, or a GGUF file; always as safetensors + tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora import hub
from llama_lora.config import Model
from llama_lora.resolve import NOT_TAKEN, Source, taken_files
from llama_lora.shards import stored_tensors
from llama_lora.shared import making


def take_snapshot(model: Model, source: Source, models: Path) -> Path:
    """The base model's folder in the workspace, MODELS/NAME@REVISION; made only if it is not there yet.

    Raises UserError where the source holds no model that can be read.
    """
    target = models / f"{source.name}@{source.revision[:12]}"
    with making(target) as missing:
        if missing:
            print(f"taking the model {model.id or model.path} into {target}", flush=True)
            if model.path:
                with files.whole_folder(target) as folder:
                    take = _convert_gguf if model.path.endswith(".gguf") else _copy
                    take(Path(model.path), folder)
                    _check(folder, model.path)
            else:
                with _resumable_folder(target) as folder:
                    _download(model.id, source.revision, folder)
                    _check(folder, model.id)
    return target


@contextmanager
def _resumable_folder(target: Path) -> Iterator[Path]:
    """As files.whole_folder, but what a killed download has left is gone on with: 16 GB take long."""
    folder = target.with_name(f".{target.name}.download")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub client's own notes
    files.settle(folder)
    if target.exists():  # but not whole
        shutil.rmtree(target)
    folder.rename(target)


def _download(repository: str, commit: str, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    with hub.translate_errors("model", repository):
        snapshot_download(repository, revision=commit, local_dir=folder, ignore_patterns=NOT_TAKEN)


def _copy(origin: Path, folder: Path) -> None:
    if not origin.is_dir():
        raise UserError(f"{origin} is no folder and no .gguf file", where="model.path", fix="Write one of the two.")
    for name, file in taken_files(origin).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)


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
    except Exception as error:  # a torn file ends in whatever the bytes happen to mean: IndexError, KeyError, ...
        raise UserError(
            f"transformers cannot read it as GGUF: {error}",
            where=str(file),
            fix="Download it again, or use safetensors.",
        ) from None
    # transformers 4.57 takes the tokenizer's special tokens from a default, not from the file: SmolLM2's
    # end-of-sequence token becomes <|im_start|>, so it would be trained on the wrong one. The config has it right.
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token_id = getattr(model.config, f"{name}_id", None)
        if token_id is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check(folder: Path, origin: str) -> None:
    """Refuse a snapshot that no later stage could use, while it is cheap."""
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
    missing = sorted(_parameters(folder, origin) - stored_tensors(folder).keys())
    if missing:  # transformers would make them up, at random
        raise UserError(
            f"{origin} lacks weights: {', '.join(missing[:3])}", where="model", fix="Use a whole copy of it."
        )


def _parameters(folder: Path, origin: str) -> set[str]:
    """The names of the weights the model's architecture has, but for those it shares (tied embeddings)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (ValueError, OSError, KeyError) as error:
        raise UserError(
            f"{origin} is no causal language model that transformers knows: {str(error).splitlines()[0]}",
            where="model",
            fix="Write a Llama, or another causal language model.",
        ) from None
    return {name for name, _ in model.named_parameters()}  # names a shared one once
