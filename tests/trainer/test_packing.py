from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_lora.data.batches import batch
from llama_lora.data.packing import join, pack
from llama_lora.data.rendering import IGNORED, Example
from llama_lora.losses import loss_sum

MAX_LENGTH = 32


def example(number: int, length: int) -> Example:
    return Example([number] * length, [IGNORED] + [number] * (length - 1))


@given(st.lists(st.integers(2, MAX_LENGTH), max_size=60))
def test_every_example_is_in_exactly_one_row_whole_and_no_row_is_too_long(lengths: list[int]) -> None:
    rows = pack([example(number, length) for number, length in enumerate(lengths)], MAX_LENGTH)
    found: Counter[int] = Counter()
    for row in rows:
        assert len(row.input_ids) == len(row.labels) == sum(row.lengths) <= MAX_LENGTH
        position = 0
        for length in row.lengths:
            ids = row.input_ids[position : position + length]
            assert len(set(ids)) == 1 and lengths[ids[0]] == length
            assert row.labels[position : position + length] == [IGNORED, *ids[1:]]
            found[ids[0]] += 1
            position += length
    assert found == Counter(range(len(lengths)))


@given(st.lists(st.integers(2, MAX_LENGTH), min_size=1, max_size=60))
def test_no_two_rows_could_be_one(lengths: list[int]) -> None:
    """So packing is never worse than twice the fewest rows possible."""
    rows = sorted(sum(row.lengths) for row in pack([example(1, length) for length in lengths], MAX_LENGTH))
    assert len(rows) < 2 or rows[0] + rows[1] > MAX_LENGTH


def test_the_mask_shows_a_token_its_own_example_up_to_itself_and_padding_nothing() -> None:
    rows = [{"input_ids": [1, 2, 3, 4, 5], "labels": [IGNORED] * 5, "lengths": [3, 2]}]
    packed = batch(rows, pad_id=0, length=6)
    assert packed.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert packed.labels[0, 5] == IGNORED


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa").eval()


def only(position: int, examples: list[Example]) -> Example:
    """The example at ``position`` in a row with the others, where it alone carries loss."""
    silent = [e if i == position else Example(e.input_ids, [IGNORED] * len(e.labels)) for i, e in enumerate(examples)]
    return join(silent).__dict__


def test_changing_one_packed_example_leaves_the_losses_of_the_others_equal(model: Any) -> None:
    texts = [list(range(10, 30)), list(range(40, 52)), list(range(60, 75))]
    before = [Example(ids, [IGNORED, *ids[1:]]) for ids in texts]
    changed = [before[0], Example([200] * 12, [IGNORED] + [200] * 11), before[2]]
    with torch.no_grad():
        for position in (0, 2):
            was = loss_sum(model, batch([only(position, before)], pad_id=0)).item()
            assert loss_sum(model, batch([only(position, changed)], pad_id=0)).item() == was
        assert loss_sum(model, batch([only(1, before)], pad_id=0)) != loss_sum(
            model, batch([only(1, changed)], pad_id=0)
        )


def test_a_packed_example_has_the_loss_it_has_alone(model: Any) -> None:
    texts = [list(range(10, 30)), list(range(40, 52))]
    examples = [Example(ids, [IGNORED, *ids[1:]]) for ids in texts]
    with torch.no_grad():
        for position in range(2):
            packed = loss_sum(model, batch([only(position, examples)], pad_id=0)).item()
            alone = loss_sum(model, batch([join([examples[position]]).__dict__], pad_id=0)).item()
            assert packed == pytest.approx(alone, rel=1e-5)


def test_padding_changes_no_loss(model: Any) -> None:
    row = join([Example(list(range(10, 30)), [IGNORED, *range(11, 30)])]).__dict__
    with torch.no_grad():
        tight = loss_sum(model, batch([row], pad_id=0)).item()
        assert loss_sum(model, batch([row], pad_id=7, length=64)).item() == pytest.approx(tight, rel=1e-5)


def test_the_loss_is_that_of_transformers(model: Any) -> None:
    ids = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(0))
    row = {"input_ids": ids[0].tolist(), "labels": [IGNORED, *ids[0, 1:].tolist()], "lengths": [20]}
    with torch.no_grad():
        assert loss_sum(model, batch([row], pad_id=0)).item() / 19 == pytest.approx(
            model(input_ids=ids, labels=ids).loss.item(), rel=1e-5
        )


def test_a_batch_without_any_label_still_has_a_gradient(model: Any) -> None:
    empty = {"input_ids": [1, 2, 3], "labels": [IGNORED] * 3, "lengths": [3]}
    loss = loss_sum(model, batch([empty], pad_id=0))
    assert loss.item() == 0.0 and loss.requires_grad
