"""The tokenizer of a GGUF file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy
import pytest
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM

from llama_lora import library_versions
from llama_lora.config import Model
from llama_lora.data import resolve
from llama_lora.data.snapshot import take_snapshot
from trainer.chat_templates import family_tokenizer


def write_gguf(file: Path, begin: bool) -> None:
    """Write a Llama of one layer with a tokenizer like SmolLM2's: three special tokens, the bytes and two words."""
    size, inner = 32, 64
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ab", "cd"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(size)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_dimension_count(size // 4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "c d"])  # of one, transformers 4.57 makes no list
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(begin)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    shapes = {"token_embd": (len(tokens), size), "output_norm": (size,)}
    shapes |= {f"blk.0.{name}": (size,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.attn_{name}": (size, size) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (inner, size), "blk.0.ffn_up": (inner, size), "blk.0.ffn_down": (size, inner)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", numpy.ones(shape, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("begin", [True, False])
def test_a_tokenizer_made_from_gguf_begins_texts_as_the_file_says(tmp_path: Path, begin: bool) -> None:
    """transformers 4.57 puts SmolLM2's <|im_start|> before every text although the file says no; 5 never does."""
    file = tmp_path / "model.gguf"
    write_gguf(file, begin)
    folder = take_snapshot(Model(path=str(file)), resolve.Source("s", "1"), tmp_path)
    tokenizer = library_versions.load_tokenizer(folder)
    found = [tokenizer.decode([token]) for token in tokenizer("Hi").input_ids]
    assert found == ["<|im_start|>"] * begin + ["H", "i"]


def test_a_gguf_model_becomes_safetensors_with_the_right_end_of_sequence_token(tmp_path: Path) -> None:
    """transformers 4.57 takes <|im_start|> for the end of such a file's texts, and would train it never to stop."""
    file = tmp_path / "model.gguf"
    write_gguf(file, begin=False)
    folder = take_snapshot(Model(path=str(file)), resolve.Source("s", "1"), tmp_path)
    tokenizer = library_versions.load_tokenizer(folder)
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")
    assert tokenizer("<|im_start|>Hi<|im_end|>").input_ids[0] == 1 and tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype.itemsize == 2 and model.generation_config.eos_token_id == 2


@pytest.mark.parametrize("begin", [True, False])
def test_beginning_texts_changes_no_other_token(tmp_path: Path, begin: bool) -> None:
    tokenizer = family_tokenizer("llama-3")
    library_versions.begin_texts(tokenizer, begin)
    tokenizer.save_pretrained(tmp_path)
    loaded = library_versions.load_tokenizer(tmp_path)
    assert (
        loaded("Hi").input_ids == [tokenizer.bos_token_id] * begin + tokenizer("Hi", add_special_tokens=False).input_ids
    )
