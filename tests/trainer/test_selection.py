"""Which rows are held out, which texts are removed from train, and how often a row is used."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llama_lora.data.selection import Kept, Selection, draw, select


def kept_of(digests: list[list[int]], **rows: list[int]) -> Kept:
    """Rows by the digests of their texts, each one example."""
    kept = Kept()
    for texts in digests:
        kept.texts.append(len(texts))
        kept.digests.extend(texts)
        kept.pieces.extend([1] * len(texts))
    for name in ("sources", "groups", "held_out"):
        getattr(kept, name).extend(rows.get(name, [0] * len(digests)))
    return kept


def selected(kept: Kept, weights: dict[int, float] | None = None, **options: Any) -> Selection:
    settings = {"fraction": 0.25, "seed": 42, "grouped": False, "eval_source": False, **options}
    return select(kept, weights or {0: 1.0}, **settings)


def test_the_held_out_rows_are_the_seeded_draw_of_earlier_releases() -> None:
    drawn = random.Random(42).sample(range(200), 4)
    found = selected(kept_of([[number] for number in range(200)]), fraction=0.02)
    assert found.held_out.tolist() == drawn
    assert found.train.tolist() == [number for number in range(200) if number not in drawn]


def test_the_first_held_out_rows_are_a_fair_sample_of_a_sorted_file() -> None:
    numbers = draw(1000, 0.1, seed=42).tolist()
    assert len(set(numbers)) == 100 and numbers != sorted(numbers)
    assert 300 < sum(numbers[:25]) / 25 < 700


@given(st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=3), min_size=2, max_size=40), st.integers(0, 5))
def test_no_held_out_text_is_trained_on_and_every_other_is_exactly_once(texts: list[list[int]], seed: int) -> None:
    found = selected(kept_of(texts), seed=seed)
    digests = [digest for row in texts for digest in row]
    held_out = [digests[example] for example in found.held_out]
    used = Counter(found.train.tolist())
    assert not {digests[example] for example in used} & set(held_out)
    assert found.in_both == len(digests) - len(used) - len(held_out)
    assert set(used.values()) <= {1}
    assert found.duplicates == len(digests) - len(set(digests))


def test_texts_of_one_row_and_pieces_of_one_text_stay_together() -> None:
    kept = kept_of([[1, 2], [3], [4]])
    kept.pieces = array("i", [2, 1, 3, 1])
    for seed in range(10):
        found = selected(kept, fraction=1 / 3, seed=seed)
        assert sorted([*found.train.tolist(), *found.held_out.tolist()]) == list(range(7))
        assert set(found.held_out.tolist()) in ({0, 1, 2}, {3, 4, 5}, {6})


@given(
    st.lists(st.integers(0, 9), min_size=10, max_size=80).filter(lambda groups: len(set(groups)) > 1),
    st.floats(0.05, 0.5),
    st.integers(0, 5),
)
def test_equal_values_of_the_group_column_stay_on_one_side(groups: list[int], fraction: float, seed: int) -> None:
    kept = kept_of([[number] for number in range(len(groups))], groups=groups)
    found = selected(kept, grouped=True, fraction=fraction, seed=seed)
    held_out, train = ({groups[example] for example in part.tolist()} for part in (found.held_out, found.train))
    assert train and held_out and not train & held_out
    largest = max(Counter(groups).values())
    assert abs(len(found.held_out) - fraction * len(groups)) <= largest + 1


def test_the_rows_of_an_eval_source_are_held_out_and_nothing_is_drawn() -> None:
    found = selected(kept_of([[1], [2], [3], [2], [4]], held_out=[0, 0, 0, 1, 1]), eval_source=True)
    assert found.held_out.tolist() == [3, 4] and found.train.tolist() == [0, 2]
    assert (found.in_both, found.duplicates, found.held_out_rows) == (1, 1, 2)


def test_a_weight_repeats_rows_and_its_fraction_is_a_seeded_draw_on_the_train_side() -> None:
    sources = [0] * 40 + [1] * 40 + [2] * 40
    kept = kept_of([[number] for number in range(120)], sources=sources)
    weights = {0: 2.0, 1: 0.5, 2: 1.5}
    found = selected(kept, weights)
    used, held_out = Counter(found.train.tolist()), set(found.held_out.tolist())
    assert not used.keys() & held_out
    for source, weight in weights.items():
        rows = [number for number in range(120) if sources[number] == source and number not in held_out]
        assert sum(used[number] for number in rows) == round(weight * len(rows))
        assert {used[number] for number in rows} <= {int(weight), int(weight) + 1}
    assert found.train.tolist() == selected(kept, weights).train.tolist()
    assert found.train.tolist() != selected(kept, weights, seed=7).train.tolist()
    assert not set(selected(kept, {0: 2.0, 1: 0.5, 2: 1.5}).held_out.tolist()) ^ held_out
