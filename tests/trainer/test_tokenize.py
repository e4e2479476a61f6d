"""The data report and the split."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_lora.data import tokenized_dataset
from llama_lora.data.tokenized_dataset import tokenize_dataset
from llama_lora.stages.tokenize import load_tokenizer
from trainer.conftest import Run


def report_of(run: Run) -> dict[str, Any]:
    dataset = run.workspace / run.manifest("tokenize")["facts"]["dataset"]
    report: dict[str, Any] = json.loads((dataset / "report.json").read_text())
    return report


def test_the_report_counts_kept_dropped_and_truncated_rows(new_run: Callable[..., Run]) -> None:
    run = new_run(dataset={"evalFraction": 0.25, "overlong": "truncate"}, training={"maxSequenceLength": 60})
    rows = [
        {"q": "Short?", "a": "Yes."},
        {"q": "Long?", "a": "Very long indeed. " * 9},  # truncated
        {"q": "Empty?", "a": ""},
        {"q": "Q" * 80, "a": "Never seen."},
        {"q": "Also?", "a": "Also."},
        {"q": "And?", "a": "And."},
    ]
    Path(run.config["dataset"]["source"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = run("tokenize")
    report = report_of(run)
    assert (report["rows_read"], report["kept"], report["truncated"]) == (6, 4, 1)
    assert report["dropped"] == {"empty output": 1, "prompt fills maxSequenceLength": 1}
    assert report["eval"]["examples"] == 1 and report["train"]["examples"] == 3
    train = report["train"]
    assert train["mask_share"] == round(1 - train["trained_tokens"] / train["tokens"], 4)
    assert train["packing_efficiency"] == round(train["tokens"] / (train["rows"] * 60), 4)
    assert (report["rendered_with"], report["date_in_template"]) == ("the tokenizer's chat template", None)
    assert len(report["shown"]) == 3
    for pieces in report["shown"]:
        answer = next(index for index, piece in enumerate(pieces) if piece["trained"])
        question = "".join(piece["text"] for piece in pieces[:answer])
        assert question.startswith("<|start|>user\n") and question.endswith("<|start|>assistant\n")
        assert {piece["text"] for piece in pieces if piece["special"]} == {"<|start|>", "<|end|>"}
    assert "rows dropped: 1 (empty output)" in said and "rows truncated to maxSequenceLength: 1" in said


def test_a_misspelled_optional_column_is_an_error(new_run: Callable[..., Run]) -> None:
    run = new_run(dataset={"columns": {"instruction": "q", "output": "a", "input": "contxt"}})
    said = run("tokenize", status=2)
    assert "dataset.columns.input: no row has a column 'contxt'" in said and said.endswith(": a, q.\n")
    assert not list(run.workspace.glob("datasets/*/"))


def test_no_held_out_rows_with_evaluation_enabled_is_an_error_of_tokenize(new_run: Callable[..., Run]) -> None:
    run = new_run(dataset={"evalFraction": 0.0})
    assert "dataset.evalFraction: none of 40 rows is held out" in run("tokenize", status=2)
    run.config["evaluation"]["enabled"] = False
    run("tokenize")


def test_an_empty_dataset_is_an_error_with_the_reasons_for_dropped_rows(new_run: Callable[..., Run]) -> None:
    run = new_run()
    Path(run.config["dataset"]["source"]).write_text('{"q": "x", "a": ""}\n')
    assert "dataset: no rows left to train on: 1 dropped: 1 (empty output); the first is" in run("tokenize", status=2)
    Path(run.config["dataset"]["source"]).write_text("\n")
    assert "dataset.source: the dataset has no rows" in run("tokenize", status=2)


def test_the_share_that_an_error_names_is_accepted(new_run: Callable[..., Run]) -> None:
    run = new_run()
    rows = [{"q": f"{n}?", "a": "Yes." if n < 199 else ""} for n in range(400)]  # 0.5025 are dropped
    Path(run.config["dataset"]["source"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "raise it to 0.51 or more" in run("tokenize", status=2)


def test_without_packing_every_row_is_one_example(new_run: Callable[..., Run]) -> None:
    run = new_run(training={"packing": False})
    run("tokenize")
    assert run.rows == report_of(run)["train"]["examples"] == 36


def test_rows_that_change_while_they_are_read_are_not_kept_under_the_digest_of_those_before(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run()
    source = Path(run.config["dataset"]["source"])
    whole = source.read_bytes()

    def read_while_it_is_written(*arguments: Any) -> None:
        source.write_bytes(b"".join(whole.splitlines(keepends=True)[:20]))
        tokenize_dataset(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tokenized_dataset, "tokenize_dataset", read_while_it_is_written)
        said = run("tokenize", status=2)
    assert "dataset.source: has changed while it was read" in said
    source.write_bytes(whole)
    run("tokenize")
    assert report_of(run)["train"]["examples"] == 36


def test_a_tokenizer_is_loaded_as_its_file_describes_it_whatever_class_the_config_names(tmp_path: Path) -> None:
    """Here digits are split into threes, as in Llama 3; GPT2Tokenizer of transformers 5 would keep them together."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocab = {byte: index for index, byte in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "34"])}
    described = Tokenizer(models.BPE(vocab=vocab, merges=[("3", "4")]))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    threes = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    described.pre_tokenizer = pre_tokenizers.Sequence([threes, bytes_only])
    described.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "!"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    loaded = load_tokenizer(tmp_path)
    assert loaded("1234 34").input_ids == described.encode("1234 34").ids
    assert len(loaded("1234 34").input_ids) == 6 and loaded.eos_token == "!"
