"""`genvalues preview`, which runs `llama-lora preview`: rows as the model sees them, without a run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from genvalues.cli import genvalues
from llama_lora import preview
from trainer.conftest import Run, llama_lora_here
from trainer.warm import WarmPopen

PIECES = [
    {"trained": False, "special": True, "text": "<|start|>"},
    {"trained": False, "special": False, "text": "user\nHi\x1b[2J\u202e"},
    {"trained": True, "special": False, "text": "Yes."},
    {"trained": True, "special": True, "text": "<|end|>"},
    {"trained": False, "special": False, "text": "\n"},
]


def previewed(run: Run, *options: str, status: int = 0) -> str:
    return llama_lora_here("preview", "--config", str(run.write_config()), *options, status=status)


def test_the_rows_are_shown_as_the_model_sees_them_with_what_is_trained(new_run: Callable[..., Run]) -> None:
    run = new_run()
    said = previewed(run, "--rows", "2")
    assert (
        "--- example 2\n<|start|>user\nWhat is 1 + 1?<|end|>\n<|start|>assistant\n{+It is 2. So it is. <|end|>+}\n"
        in said
    )
    assert "example 3" not in said and "rows: 40 read, 40 kept" in said and "share with loss:" in said
    assert not run.workspace.exists(), "nothing is written"


def test_drops_lost_tokens_and_duplicates_are_shown_with_places(new_run: Callable[..., Run]) -> None:
    run = new_run()
    rows = [{"q": "?", "a": ""}, {"q": "?", "a": "No."}, {"q": "?", "a": "No."}, {"q": "Q", "a": "long " * 60}]
    source = Path(run.config["dataset"]["source"])
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = previewed(run)
    assert "rows dropped: 1 (empty output)" in said and f"empty output: {source}:1" in said
    assert "rows dropped: 1 (longer than maxSequenceLength)" in said and f"{source}:4" in said
    assert "duplicates: 1" in said and "are lost" in said


def test_examples_of_each_source_are_shown(new_run: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("One.\nTwo.\n")
    run = new_run(dataset={"additional": {"more": {"source": str(tmp_path / "more.txt"), "format": "text"}}})
    said = previewed(run, "--rows", "1")
    assert "--- example 1 of dataset\n<|start|>user\nWhat is 0" in said
    assert "--- example 1 of dataset.additional.more\n<|bos|>{+One.<|end|>+}\n" in said and "example 2" not in said


def test_a_dataset_without_rows_is_an_error(new_run: Callable[..., Run]) -> None:
    run = new_run()
    Path(run.config["dataset"]["source"]).write_text("\n")
    assert "dataset.source: the dataset has no rows" in previewed(run, status=2)


def test_only_the_first_rows_are_read(new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "READ_ROWS", 7)
    assert "rows: 7 read" in previewed(new_run())


@pytest.mark.parametrize("color", [True, False])
def test_a_row_cannot_control_the_terminal(color: bool) -> None:
    shown = preview.marked(PIECES, color=color)
    assert "Hi\\x1b[2J\\u202e" in shown
    assert ("\x1b" in shown) == color
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert plain.isprintable() or set(filter(lambda each: not each.isprintable(), plain)) == {"\n"}


def test_the_trained_text_is_green_and_special_tokens_are_bold() -> None:
    shown = preview.marked(PIECES, color=True)
    assert "\x1b[32mYes.\x1b[0m" in shown and "\x1b[1m<|start|>" in shown and "\x1b[32m\x1b[1m<|end|>" in shown
    assert preview.marked(PIECES, color=False).endswith("{+Yes.<|end|>+}\n")


@pytest.mark.parametrize(("terminal", "no_color", "wanted"), [(True, "", True), (True, "1", False), (False, "", False)])
def test_colors_are_for_terminals_and_no_color_turns_them_off(
    terminal: bool, no_color: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("NO_COLOR", no_color)
    assert preview.wants_color() is wanted


def test_genvalues_preview_shows_the_dataset_of_an_inputs_file(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "Popen", WarmPopen)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Hi?", "output": "Yes."}\n')
    inputs: dict[str, Any] = {
        "model": {"path": str(tiny_model)},
        "dataset": {"source": "rows.jsonl", "format": "instruction"},
        "instance": "cpu",
    }
    file = tmp_path / "finetune.yaml"
    file.write_text(yaml.safe_dump(inputs))
    assert CliRunner().invoke(genvalues, ["preview", str(file)]).exit_code == 0
    assert "user\nHi?<|end|>\n<|start|>assistant\n{+Yes.<|end|>+}\n" in capfd.readouterr().out
    (tmp_path / "rows.jsonl").write_text("{\n")
    assert CliRunner().invoke(genvalues, ["preview", str(file)]).exit_code == 2
    said = capfd.readouterr().err
    assert "rows.jsonl:1" in said and "Traceback" not in said
