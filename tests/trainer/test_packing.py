from __future__ import annotations

from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_lora.data.batches import isolating_mask, make_batch, pad_rows
from llama_lora.data.packing import PackedRow, pack
from llama_lora.data.tokens import IGNORED, Example
from llama_lora.losses import loss_sum

MAX_LENGTH = 32


def example(number: int, length: int) -> Example:
    return of([number] * length)


def of(ids: list[int]) -> Example:
    """An example with a loss on all tokens but the first."""
    return Example(array("i", ids), array("i", [IGNORED, *ids[1:]]))


def row(*examples: Example) -> dict[str, Any]:
    """A row as read from the dataset folder."""
    packed = PackedRow(examples)
    return {name: list(getattr(packed, name)) for name in ("input_ids", "labels", "lengths")}


@given(st.lists(st.integers(2, MAX_LENGTH), max_size=60))
def test_every_example_is_whole_in_exactly_one_row_and_no_row_is_too_long(lengths: list[int]) -> None:
    rows = pack([example(number, length) for number, length in enumerate(lengths)], MAX_LENGTH)
    found: Counter[int] = Counter()
    for packed in rows:
        assert len(packed.input_ids) == len(packed.labels) == sum(packed.lengths) <= MAX_LENGTH
        position = 0
        for length in packed.lengths:
            ids = packed.input_ids[position : position + length].tolist()
            assert len(set(ids)) == 1 and lengths[ids[0]] == length
            assert packed.labels[position : position + length].tolist() == [IGNORED, *ids[1:]]
            found[ids[0]] += 1
            position += length
    assert found == Counter(range(len(lengths)))


@given(st.lists(st.integers(2, MAX_LENGTH), min_size=1, max_size=60))
def test_no_two_rows_could_be_one(lengths: list[int]) -> None:
    """So packing never uses more than twice the optimal number of rows."""
    rows = sorted(sum(packed.lengths) for packed in pack([example(1, length) for length in lengths], MAX_LENGTH))
    assert len(rows) < 2 or rows[0] + rows[1] > MAX_LENGTH


def test_a_token_attends_to_its_own_example_up_to_itself() -> None:
    packed = make_batch([row(example(1, 3), example(2, 2)), row(example(3, 6))])
    assert packed.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert packed.labels[0, 5] == IGNORED


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa").eval()


def only(position: int, examples: list[Example]) -> dict[str, Any]:
    """The examples as a row in which only the one at ``position`` has a loss."""
    silent = array("i", [IGNORED])
    return row(*(e if i == position else Example(e.input_ids, silent * len(e.labels)) for i, e in enumerate(examples)))


def loss(model: Any, *rows: dict[str, Any]) -> float:
    with torch.no_grad():
        return loss_sum(model, make_batch(rows)).item()


EXAMPLES = [of(list(range(10, 30))), of(list(range(40, 52))), of(list(range(60, 75)))]


def test_changing_a_packed_example_does_not_change_the_losses_of_the_others(model: Any) -> None:
    changed = [EXAMPLES[0], of([200] * 12), EXAMPLES[2]]
    for position in (0, 2):
        assert loss(model, only(position, changed)) == loss(model, only(position, EXAMPLES))
    assert loss(model, only(1, changed)) != loss(model, only(1, EXAMPLES))


def test_a_packed_example_has_the_same_loss_as_alone(model: Any) -> None:
    for position, alone in enumerate(EXAMPLES):
        assert loss(model, only(position, EXAMPLES)) == pytest.approx(loss(model, row(alone)), rel=1e-5)


def test_padding_changes_no_loss(model: Any) -> None:
    short, long = row(EXAMPLES[1]), row(EXAMPLES[0])
    assert loss(model, short, long) == pytest.approx(loss(model, short) + loss(model, long), rel=1e-5)


def test_the_loss_equals_that_of_transformers(model: Any) -> None:
    ids = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = model(input_ids=ids, labels=ids).loss.item()
    assert loss(model, row(of(ids[0].tolist()))) / 19 == pytest.approx(theirs, rel=1e-5)


def test_a_batch_without_any_label_still_has_a_gradient(model: Any) -> None:
    empty = {"input_ids": [1, 2, 3], "labels": [IGNORED] * 3, "lengths": [3]}
    assert (nothing := loss_sum(model, make_batch([empty]))).item() == 0.0 and nothing.requires_grad


def test_a_row_that_is_not_isolated_is_one_text() -> None:
    row = {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4], "lengths": [2, 2]}
    isolated, one_text = make_batch([row]), make_batch([row], isolated=False)
    assert isolated.position_ids.tolist() == [[0, 1, 0, 1]] and one_text.position_ids.tolist() == [[0, 1, 2, 3]]
    assert one_text.attention_mask[0, 0].tolist() == [[j <= i for j in range(4)] for i in range(4)]
    assert not isolated.attention_mask[0, 0, 2, 1]


def test_rows_are_padded_to_the_given_length_and_a_padding_row_has_no_label() -> None:
    row = {"input_ids": [1, 2], "labels": [-100, 2], "lengths": [2]}
    arranged = pad_rows([row, None], 4)
    assert arranged.labels.tolist() == [[-100, 2, -100, -100], [-100] * 4]
    assert isolating_mask(arranged.example).any(dim=-1).all(), "a mask row without any True would give NaN"
    assert not isolating_mask(arranged.example)[0, 0, 1, 2:].any()
