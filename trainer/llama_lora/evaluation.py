"""Evaluate a model on the held-out rows: loss, perplexity and sample answers, with transformers on the CPU.

Losses need one decoder layer in memory at a time. Answers need the whole model: each token reads every weight.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from genvalues.accelerators.cpu_memory import BATCH_TOKENS, GENERATION, SAMPLE_TOKENS
from genvalues.common.errors import UserError
from llama_lora import environment, library_versions
from llama_lora.data.tokens import IGNORED
from llama_lora.model_files import COMPLETE, check_folder
from llama_lora.probe import trained_tokens
from llama_lora.progress import StageProgress
from llama_lora.safetensors_files import stored_tensors

if TYPE_CHECKING:
    from llama_lora.streaming import StreamedModel

TEXT_PROMPT_TOKENS = 32  # rows of format text have no prompt: a sample continues this many tokens


@dataclass(frozen=True)
class Score:
    """For each held-out row, the summed cross entropy of its trained tokens (nats), and their number."""

    losses: list[float]
    tokens: list[int]

    def first(self, count: int) -> Score:
        """The losses of the first ``count`` rows."""
        return Score(self.losses[:count], self.tokens[:count])

    @property
    def loss(self) -> float:
        """The mean in nats per trained token."""
        return sum(self.losses) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700))  # e^710 overflows a float

    def __str__(self) -> str:
        """``loss 3.4678, perplexity 32.07``."""
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f}"

    def as_record(self) -> dict[str, float]:
        """Loss and perplexity as JSON values."""
        return {"loss": self.loss, "perplexity": self.perplexity}


@dataclass(frozen=True)
class Prompt:
    """A held-out row, split before its last answer. Token ids."""

    prompt: list[int]
    answer: list[int]


def load_model(path: Path) -> Any:
    """Load a whole model folder in its stored dtype, in evaluation mode, with transformers.

    Raises UserError unless all weights come from the folder's safetensors.
    """
    from transformers.utils import logging as transformers_logging

    from llama_lora.bf16 import speed_up_linear_layers

    transformers_logging.disable_progress_bar()
    check_folder(path)
    stored_tensors(path)
    model, random = library_versions.load_model(path, dtype="auto", attn_implementation="sdpa")
    if random:
        raise UserError(f"lacks the weights of {random[0]} in its shape", where=str(path), fix=COMPLETE)
    speed_up_linear_layers(model)
    return model.eval()


def score(model: StreamedModel, rows: Sequence[dict[str, Any]], ends: float | None = None) -> Score:
    """Compute the losses of the rows, or of the first of them that can be computed until ``ends`` (time.monotonic).

    The first batch, with a trained token, is always computed. Its time tells how many rows there is time for, and so
    does each later part.
    """
    losses: list[float] = []
    lengths, tokens = [len(row["input_ids"]) for row in rows], [trained_tokens(row) for row in rows]
    first = None
    if ends is not None:
        in_batch = sum(total <= BATCH_TOKENS for total in itertools.accumulate(lengths))
        first = max(in_batch, 1 + next((number for number, count in enumerate(tokens) if count), 0))
    pace: Pace | None = None
    with StageProgress("held-out row", len(rows)) as progress:
        for begin, planned in in_parts(model, lengths, first):
            end = planned
            if pace is not None and ends is not None:
                end = begin + pace.rows(lengths[begin:planned], ends - time.monotonic())
            if end > begin:
                began, read_before = time.monotonic(), model.seconds_reading
                losses += part_losses(model, rows[begin:end], progress)
                reading = model.seconds_reading - read_before
                pace = Pace(reading, (time.monotonic() - began - reading) / sum(lengths[begin:end]))
            if end < planned:
                break
    return Score(losses, tokens[: len(losses)])


def part_losses(model: StreamedModel, rows: Sequence[dict[str, Any]], progress: StageProgress) -> list[float]:
    """Compute the losses of rows in one pass over the weights."""
    from llama_lora.data.batches import make_batch

    done = progress.done
    layers = itertools.count(1)
    groups = grouped([len(row["input_ids"]) for row in rows])
    summed = model.row_losses(
        [make_batch([rows[number] for number in group]) for group in groups],
        lambda: progress.update(done + len(rows) * next(layers) // model.layer_count),
    )
    losses = [0.0] * len(rows)
    for group, found in zip(groups, summed, strict=True):
        for number, loss in zip(group, found.tolist(), strict=True):
            losses[number] = loss
    return losses


class Pace(NamedTuple):
    """Seconds of a pass over the weights: to read them, and to compute each token."""

    reading: float
    token: float

    def rows(self, lengths: Sequence[int], seconds: float) -> int:
        """How many of the first rows one pass can compute in this time."""
        ends = itertools.accumulate(lengths)
        return sum(self.reading + self.token * tokens <= seconds for tokens in ends)


def in_parts(model: StreamedModel, lengths: Sequence[int], first: int | None) -> Iterator[tuple[int, int]]:
    """Divide rows into parts (begin, end) that are each one pass. ``first``: the rows of the first part."""
    begin = first or 0
    if begin:
        yield 0, begin
    for numbers in model.passes((1, length) for length in lengths[begin:]):
        yield begin + numbers[0], begin + numbers[-1] + 1


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


def lacking_memory(path: Path) -> str:
    """Why answers of a model folder cannot be generated, which needs the whole model in memory; empty if they can."""
    available = environment.available_memory()
    needed = sum(tensor.end - tensor.begin for tensor in stored_tensors(path).values()) + GENERATION
    if available is None or needed <= available:
        return ""
    return (
        f"generation needs {needed / 2**30:.1f} GiB of memory, of which {max(0, available) / 2**30:.1f} are available"
    )


def answers(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int, ends: float | None = None
) -> list[str]:
    """Generate greedily from each prompt until the model stops, at most ``max_new_tokens`` tokens.

    Returns fewer answers, or shorter ones, if the time is up (``ends``, time.monotonic).
    """
    found: list[str] = []
    with StageProgress("sample", len(prompts)) as progress:
        for begin, end in batches_of([len(prompt.prompt) + max_new_tokens for prompt in prompts]):
            seconds = None if ends is None else ends - time.monotonic()
            if seconds is not None and seconds <= 0:
                break
            found += generate(model, tokenizer, prompts[begin:end], max_new_tokens, seconds)
            progress.advance(end - begin)
    return found


def batches_of(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Divide sequences into batches (begin, end) of at most SAMPLE_TOKENS tokens, padding included."""
    begin = 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or max(lengths[begin : end + 1]) * (end + 1 - begin) > SAMPLE_TOKENS:
            yield begin, end
            begin = end


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int, seconds: float | None
) -> list[str]:
    """Generate the answers of one batch, for at most so many seconds."""
    import torch

    longest = max(len(prompt.prompt) for prompt in prompts)
    pad = tokenizer.eos_token_id or 0
    ids = torch.tensor([[pad] * (longest - len(prompt.prompt)) + prompt.prompt for prompt in prompts])
    attends = torch.tensor([[0] * (longest - len(prompt.prompt)) + [1] * len(prompt.prompt) for prompt in prompts])
    with torch.no_grad():
        generated = model.generate(
            ids,
            attention_mask=attends,
            max_new_tokens=max_new_tokens,
            max_time=seconds,
            do_sample=False,
            temperature=None,
            top_p=None,
            pad_token_id=pad,
        )
    stops = model.generation_config.eos_token_id
    stops = {stops} if isinstance(stops, int) else set(stops or ())
    texts = []
    for tokens in generated[:, longest:].tolist():
        end = next((number for number, token in enumerate(tokens) if token in stops), len(tokens))
        texts.append(tokenizer.decode(tokens[: end + 1], skip_special_tokens=True).strip())
    return texts
