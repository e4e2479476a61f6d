from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_lora import environment, evaluation
from llama_lora.evaluation import Score
from llama_lora.stage import Stage
from trainer.conftest import Run


def test_the_losses_equal_those_of_transformers_on_each_held_out_row(whole_run: Run) -> None:
    from datasets import load_from_disk
    from transformers import AutoModelForCausalLM

    facts = whole_run.manifest("tokenize")["facts"]
    rows = load_from_disk(str(whole_run.workspace / facts["dataset"] / "eval"))
    result = json.loads((whole_run.paths.evaluation / "eval.json").read_text())
    assert result.keys() == {"base", "merged", "rows", "verdict", "notes"} and result["rows"] == len(rows) == 4
    for name, folder in {"base": whole_run.workspace / facts["model"], "merged": whole_run.paths.merged}.items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        total, tokens = 0.0, 0
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").item()
            tokens += int((labels != -100).sum())
        assert result[name]["loss"] == pytest.approx(total / tokens, abs=1e-4)
        assert result[name]["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-3)
    assert result["merged"]["loss"] < result["base"]["loss"]


def test_no_held_out_row_is_trained_on(whole_run: Run) -> None:
    from datasets import load_from_disk

    dataset = whole_run.workspace / whole_run.manifest("tokenize")["facts"]["dataset"]
    train, held_out = (load_from_disk(str(dataset / name)) for name in ("train", "eval"))
    report = json.loads((dataset / "report.json").read_text())
    assert report["train"]["examples"] + report["eval"]["examples"] == report["kept"] == 40
    trained = [tuple(row["input_ids"]) for row in train]
    for row in held_out:
        ids = row["input_ids"]
        assert not any(ids == list(t[i : i + len(ids)]) for t in trained for i in range(len(t)))


def test_the_samples_have_what_both_models_answer(whole_run: Run) -> None:
    samples = json.loads((whole_run.paths.evaluation / "samples.json").read_text())
    assert len(samples) == 2
    for sample in samples:
        assert sample.keys() == {"prompt", "reference", "base", "merged"}
        assert sample["reference"].startswith("It is ") and sample["prompt"].endswith("assistant\n")


def test_a_changed_number_of_samples_reruns_evaluate_alone(finished_run: Run) -> None:
    finished_run.config["evaluation"]["samples"] = 1
    assert "skipped" in finished_run("merge") and "skipped" not in finished_run("evaluate")
    assert len(json.loads((finished_run.paths.evaluation / "samples.json").read_text())) == 1


def test_a_loss_that_is_not_finite_is_refused_with_the_model(
    finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from an embedding of NaN that only a held-out row uses: a retry would not help."""
    monkeypatch.setattr(
        evaluation, "score", lambda _, rows, ends: Score([1.0, math.nan, *[1.0] * (len(rows) - 2)], [1] * 4)
    )
    finished_run.paths.manifest("evaluate").unlink()
    said = finished_run("evaluate", status=2)
    base = finished_run.workspace / finished_run.manifest("tokenize")["facts"]["model"]
    assert f"{base}: " in said and "row 1 (from 0) is nan" in said


def forget(run: Run) -> None:
    run.paths.manifest("evaluate").unlink()


def facts_of(run: Run) -> dict[str, Any]:
    facts: dict[str, Any] = run.manifest("evaluate")["facts"]
    return facts


def test_rows_that_there_is_no_time_for_are_left_out_and_the_report_says_so(finished_run: Run) -> None:
    """The first batch is computed whatever the time; a batch has one of these rows here, and no answer has time."""
    whole = facts_of(finished_run)
    finished_run.config["evaluation"]["maxHours"] = 1e-9
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "BATCH_TOKENS", 1)
        said = finished_run("evaluate")
    facts = facts_of(finished_run)
    assert facts["rows"] == 1 and whole["rows"] == 4 and not whole["notes"]
    rows, samples = facts["notes"]
    assert "first 1 of 4 held-out rows" in rows and "0 of 2 sample answers" in samples
    report = finished_run.paths.report.read_text()
    for note in (rows, samples):
        assert "evaluation.maxHours" in note and note in said and note in report
    assert json.loads((finished_run.paths.evaluation / "samples.json").read_text()) == []


def test_no_rows_are_left_out_without_a_limit_or_when_there_is_time(finished_run: Run) -> None:
    before = facts_of(finished_run)
    for hours in (0, 100):
        finished_run.config["evaluation"]["maxHours"] = hours
        assert "skipped" not in finished_run("evaluate")
        found = facts_of(finished_run)
        assert found["rows"] == 4 and found["notes"] == []
        assert found["base"]["loss"] == pytest.approx(before["base"]["loss"], rel=1e-6)


def test_the_time_of_the_first_rows_tells_how_many_there_is_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the weights takes 10 s in this model, and a token one."""
    clock = 0.0
    computed: list[int] = []

    class Model:
        seconds_reading = 0.0
        layer_count = 1

        def passes(self, shapes: Iterable[tuple[int, int]]) -> list[list[int]]:
            numbers = range(len(list(shapes)))
            return [list(numbers[begin : begin + 4]) for begin in range(0, len(numbers), 4)]

        def row_losses(self, batches: list[Any], layer_done: Callable[[], None]) -> list[torch.Tensor]:
            nonlocal clock
            clock += 10 + sum(batch.input_ids.numel() for batch in batches)
            self.seconds_reading += 10
            computed.append(sum(len(batch.input_ids) for batch in batches))
            return [torch.arange(len(batch.input_ids)).double() for batch in batches]

    monkeypatch.setattr(evaluation.time, "monotonic", lambda: clock)
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", 10)
    rows = [{"input_ids": [1] * 10, "labels": [1] * 10, "lengths": [10]}] * 12
    for ends, parts in ((1.0, [1]), (49.0, [1, 1]), (50.0, [1, 2]), (100.0, [1, 4, 2]), (1e9, [1, 4, 4, 3])):
        clock = 0.0
        computed.clear()
        found = evaluation.score(Model(), rows, ends)  # type: ignore[arg-type]
        assert computed == parts and len(found.losses) == len(found.tokens) == sum(parts)
    untrained = [{**row, "labels": [-100] * 10} for row in rows[:3]]
    computed.clear()
    found = evaluation.score(Model(), [*untrained, *rows], 1.0)  # type: ignore[arg-type]
    assert computed == [4] and found.tokens == [0, 0, 0, 9], "a loss needs a trained token"


def test_answers_are_left_out_where_the_model_does_not_fit_into_memory(
    finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "available_memory", lambda: 1 << 30)
    forget(finished_run)
    said = finished_run("evaluate")
    (note,) = facts_of(finished_run)["notes"]
    assert "No sample answers" in note and "2.0 GiB" in note and "1.0 are available" in note
    assert "stages.evaluate.resources.limits.memory" in note and note in said
    assert note in finished_run.paths.report.read_text() and facts_of(finished_run)["rows"] == 4


def test_memory_is_that_of_the_container_and_of_the_node(tmp_path: Path) -> None:
    page = os.sysconf("SC_PAGE_SIZE")

    def of(limit: str, file: str = "memory.max") -> int | None:
        (tmp_path / "proc/self").mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc/self/statm").write_text("900 100 20 1 0 30 0")
        (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemFree: 1 kB\nMemAvailable: 8000 kB\n")
        shutil.rmtree(tmp_path / "sys", ignore_errors=True)
        (tmp_path / "sys/fs/cgroup" / file).parent.mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup" / file).write_text(limit)
        return environment.available_memory(tmp_path)

    assert of("4096000\n") == of("4096000\n", "memory/memory.limit_in_bytes") == 4096000 - 100 * page
    assert of("max\n") == of("9223372036854771712\n", "memory/memory.limit_in_bytes") == 8000 * 1024
    assert environment.available_memory(tmp_path / "elsewhere") is None


def test_answers_of_a_batch_are_those_of_each_prompt_alone(whole_run: Run) -> None:
    from llama_lora.stages.tokenize import load_tokenizer

    model, tokenizer = evaluation.load_model(whole_run.paths.merged), load_tokenizer(whole_run.paths.merged)
    prompts = [evaluation.Prompt(list(b"What is 2?")[:length], []) for length in (10, 4, 7)]
    together = evaluation.answers(model, tokenizer, prompts, 12)
    assert together == [evaluation.answers(model, tokenizer, [prompt], 12)[0] for prompt in prompts]
    assert all(together)


def test_a_batch_of_answers_is_bounded_and_has_at_least_one() -> None:
    assert list(evaluation.batches_of([1500, 1500, 1000, 9000, 100])) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert list(evaluation.batches_of([1] * 5)) == [(0, 5)] and not list(evaluation.batches_of([]))


def test_a_run_of_a_chart_without_max_hours_is_not_evaluated_again(finished_run: Run) -> None:
    def fingerprint() -> str | None:
        return Stage("evaluate", finished_run.load(), finished_run.paths).fingerprint

    before = fingerprint()
    finished_run.config["evaluation"]["maxHours"] = 2
    assert fingerprint() == before
    finished_run.config["evaluation"]["maxHours"] = 3
    assert fingerprint() != before
