"""How good is a model on the held-out rows: loss, perplexity, and what it answers. Plain transformers, on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_lora.data.rendering import IGNORED
from llama_lora.progress import StageProgress
from llama_lora.shards import stored_tensors

BATCH_TOKENS = 2048  # rows of similar length go together, up to this many tokens with padding
TEXT_PROMPT_TOKENS = 32  # format text has no prompt: a sample goes on from so many tokens


@dataclass(frozen=True)
class Score:
    """Over the trained tokens of the held-out rows: mean cross entropy in nats, and e to it."""

    loss: float
    perplexity: float


@dataclass(frozen=True)
class Prompt:
    """A held-out row cut before its (last) answer. Token ids."""

    prompt: list[int]
    answer: list[int]


def load_model(path: Path, adapter: Path | None = None) -> Any:
    """A model folder in the dtype it is stored in, for evaluation; with the LoRA adapter of another folder or not."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="sdpa")
    if adapter:
        from peft import PeftModel

        # In the dtype it was trained in, so that it rounds as it did then: peft has the base model's, or fp32.
        in_fp32 = all(tensor.dtype == "F32" for tensor in stored_tensors(adapter).values())
        model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=in_fp32)
    return model.eval()


def score(model: Any, rows: Sequence[dict[str, Any]]) -> Score:
    """Held-out loss and perplexity."""
    import torch

    from llama_lora.data.batches import batch
    from llama_lora.losses import loss_sum

    total = 0.0
    with torch.no_grad(), StageProgress("held-out row", len(rows)) as progress:
        for group in grouped(rows):
            total += loss_sum(model, batch(group)).item()
            progress.advance(len(group))
    loss = total / sum(label != IGNORED for row in rows for label in row["labels"])
    return Score(loss, math.exp(min(loss, 700)))  # e^710 is more than a float holds


def grouped(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows in groups of similar length, each at most BATCH_TOKENS when padded to its longest."""
    groups: list[list[dict[str, Any]]] = []
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        if groups and len(groups[-1][0]["input_ids"]) * (len(groups[-1]) + 1) <= BATCH_TOKENS:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def prompt_of(row: dict[str, Any]) -> Prompt:
    """A held-out row as a question: everything before the last stretch of trained tokens, and that stretch."""
    ids, labels = row["input_ids"], row["labels"]
    trained = [label != IGNORED for label in labels]
    end = len(trained) - trained[::-1].index(True)
    begin = end
    while begin > 0 and trained[begin - 1]:
        begin -= 1
    if begin <= 1:  # format text: all of it is trained
        begin = min(TEXT_PROMPT_TOKENS, end // 2)
    return Prompt(ids[:begin], ids[begin:end])


def answer(model: Any, tokenizer: Any, prompt: Prompt, max_new_tokens: int) -> str:
    """What the model goes on with, greedily, until it stops or ``max_new_tokens``."""
    import torch

    ids = torch.tensor([prompt.prompt])
    with torch.no_grad():
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            pad_token_id=tokenizer.eos_token_id,
        )
    text: str = tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
    return text.strip()
