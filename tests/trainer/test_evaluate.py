from __future__ import annotations

import json
import math

import pytest
import torch

from llama_lora import evaluation
from llama_lora.evaluation import Score
from trainer.conftest import Run


def test_the_losses_equal_those_of_transformers_on_each_held_out_row(whole_run: Run) -> None:
    from datasets import load_from_disk
    from transformers import AutoModelForCausalLM

    facts = whole_run.manifest("tokenize")["facts"]
    rows = load_from_disk(str(whole_run.workspace / facts["dataset"] / "eval"))
    result = json.loads((whole_run.paths.evaluation / "eval.json").read_text())
    assert result.keys() == {"base", "merged", "rows", "verdict"} and result["rows"] == len(rows) == 4
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
    monkeypatch.setattr(evaluation, "score", lambda _, rows: Score([1.0, math.nan, *[1.0] * (len(rows) - 2)], [1] * 4))
    finished_run.paths.manifest("evaluate").unlink()
    said = finished_run("evaluate", status=2)
    base = finished_run.workspace / finished_run.manifest("tokenize")["facts"]["model"]
    assert f"{base}: " in said and "row 1 (from 0) is nan" in said
