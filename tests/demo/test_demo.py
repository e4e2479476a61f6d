"""What `make demo` runs, from inputs file to report, with a tiny model."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import docstrings
import pytest
import run_demo

from genvalues.common import files
from genvalues.ops.local.screen import next_steps
from trainer.conftest import make_model
from trainer.warm import WarmPopen

pytestmark = pytest.mark.long

STAGES = ["tokenize", "compile", "train", "consolidate", "merge", "evaluate"]
SKIPPED = ["preflight", "storage-prepare", "compile-gate", "train-gate"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The demo's inputs with a tiny model, sixty rows and few steps."""
    folder = tmp_path_factory.mktemp("demo-inputs")
    rows = [row for row in docstrings.question_rows() if len(row["answer"]) < 200][:60]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "model.path": make_model(folder / "tiny", dtype="bfloat16"),
        "dataset.source": folder / "rows.jsonl",
        "dataset.evalFraction": 0.1,
        "training.maxSequenceLength": 512,  # a token for each byte
        "training.maxSteps": 12,
        "training.saveSteps": 3,
        "evaluation.maxNewTokens": 4,
    }


@pytest.fixture(scope="module")
def undisturbed(settings: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo folder after an uninterrupted run, with the run's output in output.txt."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = run_demo.local_command(run_demo.HERE / "finetune.yaml", settings, folder / "workspace")
    with pytest.MonkeyPatch.context() as patch, (folder / "output.txt").open("w") as output:
        patch.setattr(subprocess, "Popen", WarmPopen)  # of what it starts, too
        subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=True)
    return folder


def test_the_output_has_progress_and_no_json(undisturbed: Path) -> None:
    output = (undisturbed / "output.txt").read_text(encoding="utf-8")
    assert ": manifest {" not in output
    assert "step 12/12  loss " in output and "ETA" in output


def test_a_warning_of_a_stage_is_noticed(undisturbed: Path, tmp_path: Path) -> None:
    """`make demo` starts each stage as it is; these tests fork it, without the warnings of its imports."""
    workspace = undisturbed / "workspace"
    logs = sorted(workspace.rglob("*.log"))
    assert {log.stem for log in logs} >= set(STAGES)
    assert run_demo.warnings_in(workspace) == []
    noise = ["[Gloo] Rank 0 is connected to 1 peer ranks.", "nanobind: leaked 64 types!"]
    (tmp_path / "train.log").write_text("\n".join([*noise, "step 1"]), encoding="utf-8")
    assert run_demo.warnings_in(tmp_path) == noise


def adapter_digest(folder: Path) -> str:
    return files.sha256(folder / "workspace" / "runs" / "demo" / "adapter" / "adapter_model.safetensors")


def test_the_docstrings_of_this_python_give_thousands_of_rows_with_unique_answers() -> None:
    rows = docstrings.question_rows()
    assert 3500 < len(rows) < 6500
    assert len({row["answer"] for row in rows}) == len(rows)
    assert rows == docstrings.question_rows(), "another order would change the fingerprint, and train again"
    by_question = {row["question"]: row["answer"] for row in rows}
    assert by_question["What does `textwrap.dedent` do in Python?"].startswith("Remove any common leading whitespace")
    assert not any(" at 0x" in row["answer"] for row in rows)


def test_the_whole_pipeline_runs_through_the_charts_stages(undisturbed: Path) -> None:
    run = undisturbed / "workspace" / "runs" / "demo"
    assert sorted(path.stem for path in (run / "stages").iterdir()) == sorted(STAGES)
    result = json.loads((run / "evaluation" / "eval.json").read_text())
    assert result["rows"] == 6 and result["merged"]["loss"] != result["base"]["loss"]
    assert (run / "report.html").is_file() and (run / "merged" / "model.safetensors").is_file()


def test_the_result_is_printed_as_the_readme_shows_it(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = undisturbed / "workspace" / "runs" / "demo"
    fell = run_demo.print_result(run)
    result = json.loads((run / "evaluation" / "eval.json").read_text())
    said = capsys.readouterr().out
    assert (
        f"held-out loss {result['base']['loss']:.4f} -> {result['merged']['loss']:.4f} ({-fell:+.1%}) on 6 rows" in said
    )
    assert said.count("--- What does `") == 2 and said.count("tuned:") == 2
    assert all(str(run / name) in "\n".join(next_steps(run)) for name in ("adapter", "merged", "report.html"))


def test_started_again_every_stage_is_skipped_in_seconds(settings: dict[str, object], undisturbed: Path) -> None:
    began = time.monotonic()
    command = run_demo.local_command(run_demo.HERE / "finetune.yaml", settings, undisturbed / "workspace")
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    said = ended.stdout + ended.stderr
    assert time.monotonic() - began < 30
    assert [stage for stage in STAGES if f"{stage}: nothing changed, skipped" in said] == STAGES
    assert all(name in said for name in SKIPPED)


def test_killed_in_any_stage_and_run_again_it_gives_the_same_adapter(
    settings: dict[str, object], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", WarmPopen)  # of what it starts, too
    workspace = tmp_path / "workspace"
    command = run_demo.local_command(run_demo.HERE / "finetune.yaml", settings, workspace)
    checkpoints = workspace / "runs" / "demo" / "checkpoints"
    for stage in STAGES:
        kill_in(stage, command, lambda stage=stage: stage != "train" or any(checkpoints.glob("*/step-*")))
        assert not (workspace / "runs" / "demo" / "stages" / f"{stage}.json").exists()
    subprocess.run(command, check=True)
    assert adapter_digest(tmp_path) == adapter_digest(undisturbed)


def kill_in(stage: str, command: list[str], is_time: Callable[[], bool]) -> None:
    """Start the pipeline and kill it (SIGKILL) once ``stage`` has begun and ``is_time`` returns true."""
    pipeline = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert pipeline.stdout is not None
    said = ""
    while f"--- {stage}" not in said:
        line = pipeline.stdout.readline()
        said += line
        assert line, f"the pipeline ended before {stage}:\n{said}"
    while not is_time():
        assert pipeline.poll() is None, f"the pipeline ended in {stage}:\n{said}{pipeline.stdout.read()}"
        time.sleep(0.05)
    pipeline.kill()
    pipeline.stdout.read()  # until its last process has ended
    pipeline.wait()
