"""The verdict of evaluate: cases whose answer is known, and how often the interval contains the truth."""

from __future__ import annotations

import json
from typing import Any

import numpy
import pytest

from llama_lora.verdict import FEWEST_ROWS, Verdict, verdict
from trainer.conftest import Run


def test_a_lower_loss_in_every_row_is_better_and_the_same_rows_give_the_same_verdict() -> None:
    tokens = list(range(5, 105))
    base = [2.0 * count for count in tokens]
    merged = [(1.7 + 0.1 * (number % 2)) * count for number, count in enumerate(tokens)]
    found = verdict(base, merged, tokens)
    assert found.verdict == "better" and found == verdict(base, merged, tokens)
    assert found.low < found.difference < found.high
    assert found.difference == pytest.approx((sum(base) - sum(merged)) / sum(tokens))
    assert str(found).startswith("better: held-out loss is 0.25 lower (95 % interval 0.2")
    worse = verdict(merged, base, tokens)
    assert worse.verdict == "worse" and worse.difference == pytest.approx(-found.difference)
    assert "0.25 higher" in str(worse) and "100 rows" in str(worse)


def test_equal_models_and_noise_show_no_difference() -> None:
    random = numpy.random.default_rng(1)
    tokens = random.integers(10, 200, 60).tolist()
    losses = [2.0 * count for count in tokens]
    same = verdict(losses, losses, tokens)
    assert (same.verdict, same.difference, same.low, same.high) == ("no difference", 0, 0, 0)
    noise = random.normal(0, 5, 60)
    found = verdict(losses, (numpy.array(losses) + noise - noise.mean()).tolist(), tokens)
    assert found.verdict == "no difference" and str(found).startswith("no difference that can be told: held-out loss")


def test_long_rows_count_by_their_tokens() -> None:
    """Nine short rows get better by 1 nat per token, a long one gets worse by more than all of them."""
    tokens = [10] * 29 + [10_000]
    gains = [10.0] * 29 + [-1000.0]
    found = verdict(gains, [0.0] * 30, tokens)
    assert found.difference < 0 and found.low < 0 < found.high and found.verdict == "no difference"


def test_few_rows_show_no_difference_and_rows_without_trained_tokens_do_not_count() -> None:
    few = FEWEST_ROWS - 1
    found = verdict([20.0] * few, [10.0] * few, [10] * few)
    assert found.verdict == "no difference" and f"fewer than {FEWEST_ROWS} rows" in str(found)
    more = verdict([20.0] * few + [0.0, 20.0], [10.0] * few + [0.0, 10.0], [10] * few + [0, 10])
    assert (more.verdict, more.rows) == ("better", FEWEST_ROWS)


@pytest.mark.parametrize("rows", [30, 200])
def test_the_interval_contains_the_truth_about_95_times_in_100(rows: int) -> None:
    """Rows of very different lengths, and gains that vary from row to row and from token to token."""
    truth, contained, simulations = 0.05, 0, 400
    random = numpy.random.default_rng(rows)
    for _ in range(simulations):
        tokens = numpy.maximum(1, random.lognormal(4, 0.8, rows).astype(int))
        per_token = truth + random.normal(0, 0.1, rows) + random.normal(0, 1, rows) / numpy.sqrt(tokens)
        base = 2.0 * tokens + random.normal(0, 20, rows)
        found = verdict(base.tolist(), (base - per_token * tokens).tolist(), tokens.tolist(), resamples=400)
        contained += found.low <= truth <= found.high
    least = 0.89 if rows < 100 else 0.92
    assert least <= contained / simulations <= 0.98


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (
            Verdict("better", 0.31, 0.2812, 0.3388, 256),
            "better: held-out loss is 0.31 lower (95 % interval 0.28 to 0.34, 256 rows)",
        ),
        (
            Verdict("worse", -0.2, -0.4, -0.1, 12),
            "worse: held-out loss is 0.20 higher (95 % interval 0.10 to 0.40, 12 rows)",
        ),
        (
            Verdict("no difference", -0.0011, -0.002, 0.001, 99),
            "no difference that can be told: held-out loss is 0.001 higher (95 % interval -0.001 to 0.002, 99 rows)",
        ),
    ],
)
def test_the_sentence_tells_direction_interval_and_rows(found: Verdict, sentence: str) -> None:
    assert str(found) == sentence


def verdict_of(result: dict[str, Any]) -> Verdict:
    return Verdict(**{key: value for key, value in result["verdict"].items() if key != "sentence"})


def test_evaluate_writes_the_verdict_that_follows_from_its_losses(whole_run: Run) -> None:
    result = json.loads((whole_run.paths.evaluation / "eval.json").read_text())
    found = verdict_of(result)
    assert result["verdict"]["sentence"] == str(found)
    assert found.rows == result["rows"] == 4 and found.verdict == "no difference"
    assert found.difference == pytest.approx(result["base"]["loss"] - result["merged"]["loss"])
