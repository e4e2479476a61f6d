"""The proof of the weights: recorded at the last save, recomputed by consolidate and merge, refused where it is off."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora import backends, probe
from llama_lora.adapter import Delta
from llama_lora.backends.checkpoints import RECORD
from llama_lora.config import Probe as Settings
from trainer.conftest import Run, make_model, make_run, write_checkpoint_record

ROWS: list[dict[str, Any]] = [
    {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, -100, -100, -100, 5, 6], "lengths": [4, 2]},
    {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4], "lengths": [4]},
    {"input_ids": [7, 8, 9], "labels": [-100, -100, 9], "lengths": [3]},
]


def checkpoint_of(run: Run) -> Path:
    return run.workspace / run.manifest("train")["facts"]["checkpoint"]


def test_rows_are_the_first_with_something_to_learn_in_what_is_left_of_them() -> None:
    chosen = probe.select_rows(ROWS, Settings(rows=2, max_tokens=8))
    assert list(chosen) == [0, 1]
    assert list(probe.select_rows(ROWS, Settings(rows=8, max_tokens=8))) == [0, 1, 2]
    assert probe.truncate(ROWS[0], 5) == {"input_ids": [1, 2, 3, 4, 5], "labels": [-100] * 4 + [5], "lengths": [4, 1]}
    assert probe.truncate(ROWS[0], 4)["lengths"] == [4] and not probe.trained_tokens(probe.truncate(ROWS[0], 4))


def test_the_mean_is_over_tokens_and_no_rows_are_no_probe() -> None:
    losses = {6: 8.0, 4: 1.0}
    measured = probe.measure(ROWS[:2], Settings(rows=2), lambda row: losses[len(row["input_ids"])])
    assert measured and (measured.tokens, measured.loss) == ([2, 3], 9 / 5)
    assert measured.first(1).loss == 4.0
    assert probe.measure(ROWS, Settings(rows=0), lambda row: 1.0) is None


def test_only_the_last_save_has_a_probe_and_it_is_the_loss_of_what_was_consolidated_and_merged(whole_run: Run) -> None:
    last = checkpoint_of(whole_run)
    recorded = backends.probe_of(last)
    assert recorded and len(recorded.rows) == 8 and sum(recorded.tokens) > 100
    assert backends.probe_of(last.with_name("step-000004")) is None
    assert whole_run.manifest("consolidate")["facts"]["probe"] == recorded.as_record()


def test_consolidate_and_merge_say_what_they_compared(finished_run: Run) -> None:
    for stage in ("consolidate", "merge"):
        finished_run.paths.manifest(stage).unlink()
    for stage in ("consolidate", "merge"):
        said = finished_run(stage)
        assert "probe: the loss of 8 rows (" in said and "when the last checkpoint was saved" in said


def recorded_otherwise(run: Run, losses: Callable[[float], float]) -> None:
    """As if training had had other weights in memory than it saved."""
    file = checkpoint_of(run) / RECORD
    record = json.loads(file.read_text())
    record["probe"]["losses"] = [losses(loss) for loss in record["probe"]["losses"]]
    write_checkpoint_record(file, record)
    manifest = run.manifest("train")
    name = str(file.relative_to(run.workspace))
    manifest["outputs"][name] = {"bytes": file.stat().st_size, "sha256": files.sha256(file)}
    run.paths.manifest("train").write_text(json.dumps(manifest))


def test_consolidate_refuses_what_was_not_trained_and_writes_nothing(finished_run: Run) -> None:
    recorded_otherwise(finished_run, lambda loss: loss * 1.02)
    before = load_file(finished_run.paths.adapter / "adapter_model.safetensors")
    finished_run.paths.manifest("consolidate").unlink()
    said = finished_run("consolidate", status=2)
    assert "these are not the trained weights: the loss of 8 rows" in said
    assert "raise probe.tolerance (0.02)" in said
    assert not finished_run.paths.manifest("consolidate").exists()
    assert load_file(finished_run.paths.adapter / "adapter_model.safetensors").keys() == before.keys()
    assert not list(finished_run.paths.run.glob(f".*{files.PARTIAL}*"))

    finished_run.config["probe"] = {"tolerance": 1.0}
    assert "probe: the loss of 8 rows" in finished_run("consolidate")


def test_merge_refuses_a_model_without_the_adapter(finished_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Delta, "added_to", lambda delta, rows, first: rows)
    finished_run.paths.manifest("merge").unlink()
    assert "these are not the trained weights" in finished_run("merge", status=2)
    assert not finished_run.paths.manifest("merge").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_refused(finished_run: Run, value: float) -> None:
    recorded_otherwise(finished_run, lambda loss: value)
    finished_run.paths.manifest("consolidate").unlink()
    said = finished_run("consolidate", status=2)
    assert f"{RECORD}: is not valid JSON" in said and "is not a JSON number" in said


def test_training_refuses_a_probe_that_is_no_number() -> None:
    with pytest.raises(UserError, match="learningRate: the loss of the probe is nan"):
        probe.measure(ROWS, Settings(rows=1), lambda row: float("nan"))


def test_fewer_rows_are_looked_at_where_fewer_are_asked_for_and_none_is_said(finished_run: Run) -> None:
    for rows, expected in ((2, "probe: the loss of 2 rows"), (0, "probe: skipped")):
        finished_run.config["probe"] = {"rows": rows}
        finished_run.paths.manifest("consolidate").unlink()
        assert expected in finished_run("consolidate")


def test_an_fp32_adapter_on_a_bf16_model_is_not_rounded_for_the_proof(tmp_path: Path) -> None:
    """As the CPU backend trains it: rounded to the base model's dtype it would have another loss (1e-3 in the demo)."""
    run = make_run(tmp_path / "run", make_model(tmp_path / "model", "bfloat16"))
    for stage in ("tokenize", "compile", "train"):
        run(stage)
    found = re.search(r"was (\S+) when .* is now (\S+)", run("consolidate"))
    assert found and abs(float(found[1]) - float(found[2])) < 2e-4  # the engine rounds fewer sums to bf16
