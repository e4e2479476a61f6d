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

from genvalues.common.json_files import with_own_digest
from llama_lora import base_scores, environment, evaluation
from llama_lora.base_scores import BaseScores
from llama_lora.evaluation import Score
from llama_lora.stage import Stage
from llama_lora.stages import evaluate
from trainer.conftest import Run
from trainer.test_training import flip_byte


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
    forget(finished_run)
    shutil.rmtree(finished_run.paths.base_scores)
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


# --- what is kept of the base model


def results_of(run: Run) -> list[bytes]:
    return [(run.paths.evaluation / name).read_bytes() for name in ("eval.json", "samples.json")]


def kept_file(run: Run) -> Path:
    (file,) = run.paths.base_scores.iterdir()
    return file


def test_reused_base_scores_give_the_same_files_as_computed_ones(finished_run: Run) -> None:
    before, file = results_of(finished_run), kept_file(finished_run)
    assert facts_of(finished_run)["base_scores"] == "computed"
    forget(finished_run)
    said = finished_run("evaluate")
    origin = facts_of(finished_run)["base_scores"]
    assert origin.startswith(f"reused from base-scores/{file.name}") and "run run" in origin and origin in said
    assert origin in finished_run.paths.report.read_text() and results_of(finished_run) == before
    forget(finished_run)
    shutil.rmtree(finished_run.paths.base_scores)
    finished_run("evaluate")
    assert facts_of(finished_run)["base_scores"] == "computed" and results_of(finished_run) == before


def test_a_run_with_another_learning_rate_does_not_read_the_base_model_again(finished_run: Run) -> None:
    before = facts_of(finished_run)
    finished_run.config["training"]["learningRate"] = 1e-3
    for stage in ("train", "consolidate", "merge"):
        finished_run(stage)
    weights = finished_run.workspace / finished_run.manifest("tokenize")["facts"]["model"] / "model.safetensors"
    flip_byte(weights, weights.stat().st_size - 8)
    assert "where run run has written it" in finished_run("evaluate")
    found = facts_of(finished_run)
    assert found["base"] == before["base"] and found["merged"] != before["merged"]


@pytest.mark.parametrize("setting", [{"maxNewTokens": 7}, {"maxRows": 3}, {"samples": 1}, {"maxHours": 100}])
def test_other_settings_of_the_evaluation_measure_the_base_model_again(
    finished_run: Run, setting: dict[str, int]
) -> None:
    finished_run.config["evaluation"] |= setting
    finished_run("evaluate")
    assert facts_of(finished_run)["base_scores"] == "computed"
    assert len(list(finished_run.paths.base_scores.iterdir())) == 2


def test_the_key_has_everything_that_the_scores_depend_on(finished_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage("evaluate", finished_run.load(), finished_run.paths)
    base, row = stage.upstream_path("tokenize", "model"), {"input_ids": [1, 2], "labels": [-100, 2], "lengths": [2]}
    keys = [
        evaluate.key_of(stage, base, rows, samples)
        for rows, samples in (([row], 1), ([row], 0), ([row, row], 1), ([{**row, "labels": [-100, -100]}], 1))
    ]
    manifest = finished_run.manifest("tokenize")
    for name in manifest["outputs"]:
        if name.startswith("models/"):
            changed = {**manifest["outputs"], name: {**manifest["outputs"][name], "sha256": "0" * 64}}
            finished_run.paths.manifest("tokenize").write_text(json.dumps({**manifest, "outputs": changed}))
            keys.append(evaluate.key_of(stage, base, [row], 1))
    finished_run.paths.manifest("tokenize").write_text(json.dumps(manifest))
    assert evaluate.key_of(stage, base, [row], 1) == keys[0]
    monkeypatch.setattr(evaluate, "installed_versions", lambda packages: dict.fromkeys(packages, "0"))
    keys.append(evaluate.key_of(stage, base, [row], 1))
    assert len(set(keys)) == len(keys) > 8


def another_loss(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "score": {**content["score"], "losses": [0.1] * 4}}


def of_other_rows(content: dict[str, Any]) -> dict[str, Any]:
    """As written for another key, and given this one's name."""
    other = {**content, "key": "0" * 64}
    return with_own_digest(other)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda text: "", "is empty"),
        (lambda text: "[]", "contains a list"),
        (lambda text: text[: len(text) // 2], "cut off"),
        (lambda text: json.dumps({"score": None}), "has no valid"),
        (lambda text: json.dumps(another_loss(json.loads(text))), "another SHA-256"),
        (lambda text: json.dumps(of_other_rows(json.loads(text))), "is of another base model"),
    ],
)
def test_base_scores_that_are_not_as_written_are_measured_again(
    finished_run: Run, spoil: Callable[[str], str], words: str
) -> None:
    before, file = results_of(finished_run), kept_file(finished_run)
    content = file.read_text()
    file.write_text(spoil(content))
    forget(finished_run)
    said = finished_run("evaluate")
    assert f"{file} " in said and words in said and "measured again" in said
    assert results_of(finished_run) == before and file.read_text() == content


def test_base_scores_are_not_read_or_written_through_a_link(finished_run: Run, tmp_path: Path) -> None:
    file = kept_file(finished_run)
    content = file.read_text()
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    forget(finished_run)
    assert "is a symbolic link" in finished_run("evaluate")
    assert not file.is_symlink() and (tmp_path / "elsewhere").read_text() == content


def test_without_verification_no_base_scores_are_kept(finished_run: Run) -> None:
    """The base model may not be the one whose digests are in the key."""
    shutil.rmtree(finished_run.paths.base_scores)
    finished_run.config["verify"] = "off"
    forget(finished_run)
    finished_run("evaluate")
    assert not finished_run.paths.base_scores.exists()


def test_the_oldest_base_scores_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_scores, "MOST_FILES", 2)
    scores = [BaseScores(Score([1.5], [1]), ["yes"], False, "run", f"{number}" * 64) for number in range(3)]
    for number, each in enumerate(scores):
        base_scores.keep(tmp_path, each)
        os.utime(base_scores.file_of(tmp_path, each.key), (number, number))
    assert [base_scores.read(tmp_path, each.key) for each in scores] == [None, *scores[1:]]
    (tmp_path / "file").touch()
    base_scores.keep(tmp_path / "file", scores[0])  # what cannot be kept fails nothing
