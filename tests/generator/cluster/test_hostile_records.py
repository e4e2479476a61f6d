"""What the trainer writes for the gate, of any content: ignored, or refused in a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from damage import spoiled
from genvalues.cluster.config import ClusterConfig
from genvalues.cluster.cost_tracker import CostTracker
from genvalues.cluster.guards import Ledger, PodUsage, StallTimer, describe_stall
from genvalues.cluster.progress import describe_checkpoint, describe_progress, read_progress
from genvalues.cluster.trainer_client import TrainerCommandFailed, parse_stage_state
from genvalues.common import manifests
from genvalues.common.errors import UserError
from genvalues.common.json_files import InvalidJson

DEEP = ["[" * 1_000_000, '{"a":' * 5000 + "1" + "}" * 5000]
CONTENTS = ["", "[]", "null", '"a"', "5", "{}", "{", "\x00", *DEEP, '{"step": NaN}']
VALUES: list[Any] = [None, True, -1, 10**400, "a", "", [], {}, "0001-01-01T00:00:00", "9999-12-31T23:59:59-23:59"]
PROGRESS = {
    "stage": "train",
    "step": 3,
    "totalSteps": 10,
    "loss": 1.5,
    "learningRate": 1e-4,
    "tokensPerSecond": 100.0,
    "etaSeconds": 60,
    "savedStep": 2,
    "updated": "2026-01-01T00:00:00+00:00",
}
LEDGER = Ledger({"uid": PodUsage("pod", "train", 1.0, 2.0)}, "job", "why").as_json()
STATE = {"stage": "train", "fingerprint": "f", "upToDate": True, "progress": "/p", "manifest": "/m"}


def texts(content: Any) -> Iterator[str]:
    yield from CONTENTS
    yield from (json.dumps(each) for each in spoiled(content, VALUES))


def test_progress_of_any_content_is_shown_or_ignored(tmp_path: Path) -> None:
    file = tmp_path / "progress.json"
    shown = 0
    for text in texts(PROGRESS):
        file.write_text(text)
        progress = read_progress(file)
        describe_checkpoint(progress)
        describe_stall(60, progress)
        StallTimer().seconds(
            {"kind": "PyTorchJob", "spec": {"pytorchReplicaSpecs": {"Worker": {"replicas": 0}}}}, [], progress, 0.0
        )
        if progress:
            assert "of" in describe_progress(progress)
            shown += 1
    assert shown > 10
    file.write_text(json.dumps(PROGRESS))
    assert read_progress(file) == PROGRESS
    file.write_text(json.dumps({**PROGRESS, "more": "x" * 100_000}))
    assert read_progress(file) == {}, "it goes into an annotation"


def test_costs_of_any_content_are_refused_in_a_line_or_counted(tmp_path: Path, config: ClusterConfig) -> None:
    file = tmp_path / "costs.json"
    for text in texts(LEDGER):
        file.write_text(text)
        try:
            ledger = CostTracker(tmp_path / "progress.json", config, 0.0, lambda: 0.0).ledger
        except UserError as refused:
            assert refused.where == str(file) and "not a valid cost file: it " in refused.what
            assert len(str(refused).splitlines()) == 1
        else:
            assert ledger.node_hours >= 0
    assert Ledger.from_json(LEDGER).as_json() == LEDGER
    with pytest.raises(InvalidJson, match="pods"):
        Ledger.from_json({**LEDGER, "pods": 5})


def test_an_answer_of_the_trainer_of_any_content_is_no_traceback() -> None:
    understood = 0
    for text in texts(STATE):
        try:
            state = parse_stage_state("train", text)
        except TrainerCommandFailed as failed:
            assert "invalid output" in str(failed) and len(str(failed).splitlines()) == 1
        else:
            understood += 1
            assert isinstance(state.up_to_date, bool) and isinstance(state.progress, Path)
    assert understood > 5


def test_a_manifest_of_any_content_is_a_line_of_the_log_or_none(tmp_path: Path) -> None:
    manifest = {
        "stage": "merge",
        "fingerprint": "f",
        "started": "a",
        "finished": "b",
        "versions": {},
        "facts": {"rows": 1},
        "outputs": {"file": {"bytes": 1, "sha256": "0"}},
    }
    file = tmp_path / "merge.json"
    lines = 0
    for text in [*texts(manifest), json.dumps({**manifest, "stage": "merge: manifest {}\nmerge"})]:
        file.write_text(text)
        line = manifests.line_of(file)
        lines += bool(line)
        assert "\n" not in line and (not line or manifests.manifests_in(line))
    assert lines > 10
