"""Evaluate a model on the held-out rows: loss, perplexity and sample answers, with transformers on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genvalues.common.errors import UserError
from llama_lora import library_versions
from llama_lora.adapter import WEIGHTS
from llama_lora.data.tokens import IGNORED
from llama_lora.model_files import COMPLETE, base_files, read_config
from llama_lora.probe import trained_tokens
from llama_lora.progress import StageProgress
from llama_lora.safetensors_files import read_header, stored_tensors

BATCH_TOKENS = 2048  # the size of a batch in tokens, padding included
TEXT_PROMPT_TOKENS = 32  # rows of format text have no prompt: a sample continues this many tokens


@dataclass(frozen=True)
class Score:
    """For each held-out row, the summed cross entropy of its trained tokens (nats), and their number."""

    losses: list[float]
    tokens: list[int]

    @property
    def loss(self) -> float:
        """The mean in nats per trained token."""
        return sum(self.losses) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700))  # e^710 overflows a float

    def as_record(self) -> dict[str, float]:
        """Loss and perplexity as JSON values."""
        return {"loss": self.loss, "perplexity": self.perplexity}


@dataclass(frozen=True)
class Prompt:
    """A held-out row, split before its last answer. Token ids."""

    prompt: list[int]
    answer: list[int]


def load_model(path: Path, adapter: Path | None = None) -> Any:
    """Load a model folder in its stored dtype, in evaluation mode, optionally with a LoRA adapter.

    Raises UserError unless all weights come from the folder's safetensors.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    base_files(path)
    read_config(path, str(path))
    stored_tensors(path)
    model, random = library_versions.load_model(path, dtype="auto", attn_implementation="sdpa")
    if random:
        raise UserError(f"lacks the weights of {random[0]} in its shape", where=str(path), fix=COMPLETE)
    if adapter:
        from peft import PeftModel

        # Load the adapter in the dtype it was trained in, so that it rounds as in training. peft chooses fp32 or the
        # base model's dtype.
        in_fp32 = all(tensor.dtype == "F32" for tensor in read_header(adapter / WEIGHTS).tensors.values())
        model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=in_fp32)
    return model.eval()


def score(model: Any, rows: Sequence[dict[str, Any]]) -> Score:
    """Compute the losses of the rows."""
    import torch

    from llama_lora.data.batches import make_batch
    from llama_lora.losses import row_loss_sums

    losses = [0.0] * len(rows)
    with torch.no_grad(), StageProgress("held-out row", len(rows)) as progress:
        for group in grouped([len(row["input_ids"]) for row in rows]):
            summed = row_loss_sums(model, make_batch([rows[number] for number in group])).tolist()
            for number, loss in zip(group, summed, strict=True):
                losses[number] = loss
            progress.advance(len(group))
    return Score(losses, [trained_tokens(row) for row in rows])


def grouped(lengths: Sequence[int]) -> list[list[int]]:
    """Group rows, by number, of similar length into batches of at most BATCH_TOKENS tokens, padding included."""
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= BATCH_TOKENS:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def prompt_of(row: dict[str, Any]) -> Prompt:
    """Split a row before its last run of trained tokens."""
    ids, labels = row["input_ids"], row["labels"]
    trained = [label != IGNORED for label in labels]
    end = len(trained) - trained[::-1].index(True)
    begin = end
    while begin > 0 and trained[begin - 1]:
        begin -= 1
    if begin <= 1:  # format text: the whole row is trained
        begin = min(TEXT_PROMPT_TOKENS, end // 2)
    return Prompt(ids[:begin], ids[begin:end])


def answer(model: Any, tokenizer: Any, prompt: Prompt, max_new_tokens: int) -> str:
    """Generate greedily from the prompt until the model stops, at most ``max_new_tokens`` tokens."""
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
