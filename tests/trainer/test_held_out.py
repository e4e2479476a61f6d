"""The held-out loss while training, the best checkpoint, and early stopping."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genvalues.common.errors import UserError
from genvalues.common.json_files import as_record
from llama_lora.backends.held_out import HeldOutLoss, HeldOutState, shares_of
from llama_lora.backends.loop import JobCheckpoints
from llama_lora.config import Training
from llama_lora.runlog import read_held_out, read_metrics
from trainer.conftest import TWO_PROCESSES, Run
from trainer.native.workers import job
from trainer.test_training import adapter_digest, flip_byte, prepared, train_command, wait_for
from trainer.warm import WarmPopen

# With this rate the first step lowers the loss of the held-out rows, and the next ones raise it.
GETS_WORSE: dict[str, Any] = {
    "learningRate": 0.5,
    "lrScheduler": "constant",
    "warmupRatio": 0.0,
    "maxSteps": 16,
    "saveSteps": 100,
    "saveTotalLimit": 1,
    "evalSteps": 1,
}


def folder_of(run: Run) -> Path:
    return run.paths.checkpoints(run.manifest("train")["fingerprint"])


def held_out(run: Run) -> list[tuple[int, float]]:
    points = read_held_out(folder_of(run) / "metrics.jsonl")
    return [(point["step"], point["eval_loss"]) for point in points]


def test_it_is_measured_before_the_first_step_every_eval_steps_and_after_the_last(
    new_run: Callable[..., Run], whole_run: Run
) -> None:
    """And changes neither the training nor its fingerprint: a run that starts to measure does not train again."""
    run = prepared(new_run(training={"evalSteps": 4}, parallelism=TWO_PROCESSES))
    said = run("train")
    assert [step for step, _ in held_out(run)] == [0, 4, 6]
    assert losses(run) == losses(whole_run)
    assert run.manifest("train")["fingerprint"] == whole_run.manifest("train")["fingerprint"]
    assert run.manifest("train")["facts"]["held_out"]["loss"] == held_out(run)[-1][1]
    assert "held-out loss" in said and "after step 4" in said
    progress = json.loads(run.paths.progress.read_text())
    assert (progress["evalStep"], progress["evalLoss"]) == held_out(run)[-1]
    result = json.loads((whole_run.paths.evaluation / "eval.json").read_text())
    assert held_out(run)[0][1] == pytest.approx(result["base"]["loss"], abs=1e-4)
    assert held_out(run)[-1][1] == pytest.approx(result["merged"]["loss"], abs=1e-3)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder_of(run) / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/loss")] == [0, 4, 6]


def facts_without_times(run: Run) -> dict[str, Any]:
    """Facts of train's manifest, without the digest of metrics.jsonl, which has times of day."""
    return {key: fact for key, fact in run.manifest("train")["facts"].items() if key != "metrics"}


def losses(run: Run) -> list[float]:
    return [step["loss"] for step in read_metrics(folder_of(run) / "metrics.jsonl")]


@pytest.fixture(scope="module")
def stopped_early(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A training that gets worse: the best checkpoint is kept, and three measurements without improvement end it."""
    from trainer.conftest import make_run

    settings = {**GETS_WORSE, "loadBestModelAtEnd": True, "earlyStoppingPatience": 3}
    run = prepared(make_run(tmp_path_factory.mktemp("early"), tiny_model, training=settings, parallelism=TWO_PROCESSES))
    run("train")
    return run


def best_of(run: Run) -> tuple[float, int]:
    return min((loss, step) for step, loss in held_out(run) if step)


def test_training_ends_when_the_held_out_loss_no_longer_falls(stopped_early: Run) -> None:
    facts = stopped_early.manifest("train")["facts"]
    loss, step = best_of(stopped_early)
    assert facts["steps"] == step + 3 < 16 and facts["stopped_early"]
    assert (facts["held_out"]["best_loss"], facts["held_out"]["best_step"]) == (loss, step)


def test_the_best_checkpoint_is_kept_beside_the_newest_and_is_what_the_manifest_names(stopped_early: Run) -> None:
    _, step = best_of(stopped_early)
    names = sorted(path.name for path in folder_of(stopped_early).glob("step-*"))
    assert names == [f"step-{step:06d}", f"step-{step + 3:06d}"]
    assert Path(stopped_early.manifest("train")["facts"]["checkpoint"]).name == f"step-{step:06d}"


def test_its_weights_are_verified_by_the_probe_and_have_the_lowest_loss(stopped_early: Run, tmp_path: Path) -> None:
    run = stopped_early.copy(tmp_path / "copy")
    assert "probe: the loss of" in run("consolidate") and "probe: the loss of" in run("merge")
    run("evaluate")
    _, step = best_of(run)
    card = (run.paths.merged / "README.md").read_text()
    assert f"`{step} of {step + 3}: the lowest held-out loss`" in card and f"over the last 1 of {step} steps" in card
    merged = json.loads((run.paths.evaluation / "eval.json").read_text())["merged"]["loss"]
    assert merged == pytest.approx(best_of(run)[0], abs=1e-3)


def test_a_training_does_not_end_with_another_checkpoint_than_a_damaged_best_one(
    stopped_early: Run, tmp_path: Path
) -> None:
    run = stopped_early.copy(tmp_path / "damaged")
    folder, best = folder_of(run), run.workspace / run.manifest("train")["facts"]["checkpoint"]
    flip_byte(best / "part-00000.safetensors")
    run.paths.manifest("consolidate").unlink(missing_ok=True)
    said = run("consolidate", status=2)
    assert f"{best} is damaged" in said and f"delete {folder} to train from the start" in said
    said = run("train", status=2)
    assert f"{folder}: the checkpoint of the lowest held-out loss (step {best_of(run)[1]}) is damaged" in said


def test_a_training_that_is_killed_and_resumed_stops_at_the_same_step_with_the_same_best(
    stopped_early: Run, tmp_path: Path
) -> None:
    run = stopped_early.copy(tmp_path / "copy")
    _, step = best_of(run)
    digest = adapter_digest(run)
    for left, name in (([step], "killed"), ([step, step + 3], "killed before the manifest")):
        again = stopped_early.copy(tmp_path / name)
        for path in folder_of(again).glob("step-*"):
            if int(path.name[-6:]) not in left:
                shutil.rmtree(path)
        again.paths.manifest("train").unlink()
        assert "resuming" in again("train")
        assert facts_without_times(again) == facts_without_times(stopped_early)
        assert held_out(again) == held_out(stopped_early)
        assert adapter_digest(again) == digest


def test_a_training_killed_at_any_moment_ends_like_an_uninterrupted_one(stopped_early: Run, tmp_path: Path) -> None:
    run = stopped_early.copy(tmp_path / "copy")
    shutil.rmtree(folder := folder_of(run))
    run.paths.manifest("train").unlink()
    trainer = WarmPopen(train_command(run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: any(folder.glob("step-*")))
    trainer.kill()
    trainer.wait()
    run("train")
    assert facts_without_times(run) == facts_without_times(stopped_early)
    assert held_out(run) == held_out(stopped_early)


class Workers:
    """A group of one."""

    rank, size = 0, 1

    def barrier(self) -> None:
        pass

    def broadcast(self, value: Any) -> Any:
        return value

    def sum(self, numbers: list[float]) -> list[float]:
        return numbers

    def any(self, value: bool) -> bool:
        return value


class Engine:
    data_rank, data_size = 0, 1

    def row_loss(self, *rows: Any) -> float:
        return math.nan

    def save(self, folder: Path) -> None:
        (folder / "part").write_text("weights")

    def restore(self, checkpoint: Path, record: Any) -> None: ...


def test_the_best_checkpoint_stays_when_other_workers_save_at_a_step_of_the_same_number(
    tmp_path: Path, tiny_model: Path
) -> None:
    given = job(tmp_path, tiny_model, eval_steps=1, load_best_model_at_end=True, save_total_limit=1)
    saved = JobCheckpoints(given, tmp_path / "checkpoints", Engine(), Workers())  # type: ignore[arg-type]
    for step, rows_done, loss in ((2, 4, 1.0), (2, 8, 2.0), (3, 12, 3.0)):
        saved.held_out = saved.held_out.after(loss, step, rows_done, 0.0)
        saved.save(step, rows_done, None)
    left = {path.name: json.loads((path / "checkpoint.json").read_text()) for path in saved.folder.glob("step-*")}
    assert sorted(record["rows_done"] for record in left.values()) == [4, 12] and "step-000003" in left
    best = saved.best()
    assert best is not None and left[best.name]["rows_done"] == 4


def test_the_checkpoint_before_a_damaged_one_can_be_resumed_when_the_damaged_one_was_the_best(
    tmp_path: Path, tiny_model: Path
) -> None:
    given = job(tmp_path, tiny_model, eval_steps=1, load_best_model_at_end=True, save_total_limit=2)
    saved = JobCheckpoints(given, tmp_path / "checkpoints", Engine(), Workers())  # type: ignore[arg-type]
    for step, loss in ((1, 1.0), (2, 2.0), (3, 0.5)):
        saved.held_out = saved.held_out.after(loss, step, step, 0.0)
        saved.save(step, step, None)
    (saved.folder / "step-000003" / "part").write_text("weightZ")
    assert saved.restore_newest() == 2
    best = saved.best()
    assert best is not None and best.name == "step-000001"
    for step in (3, 4):
        saved.held_out = saved.held_out.after(0.5, step, step, 0.0)
        saved.save(step, step, None)
    assert sorted(path.name for path in saved.folder.glob("step-*")) == ["step-000003", "step-000004"]


def test_a_best_checkpoint_that_was_renamed_for_other_workers_is_consolidated(
    stopped_early: Run, tmp_path: Path
) -> None:
    """More workers resume before the step of its number, and save at that step."""
    run = stopped_early.copy(tmp_path / "copy")
    best, newest = sorted(folder_of(run).glob("step-*"))
    digest = adapter_digest(run)
    shutil.rmtree(newest)
    for stage in ("train", "consolidate"):
        run.paths.manifest(stage).unlink()
    run.config["training"]["saveSteps"] = 1
    run.config["parallelism"] = {**run.config["parallelism"], "processesPerNode": 4, "dataParallelSize": 4}
    run("train")
    used = Path(run.manifest("train")["facts"]["checkpoint"]).name
    assert used.startswith(f"{best.name}-of-")
    assert adapter_digest(run) == digest
    points = read_held_out(folder_of(run) / "metrics.jsonl")
    assert [point["rows_done"] for point in points if point["step"] == 0] == [0], "the base model is measured once"


def test_what_the_held_out_loss_decides_is_part_of_the_fingerprint_and_measuring_alone_is_not(
    new_run: Callable[..., Run],
) -> None:
    run = new_run()
    run("tokenize")

    def fingerprint(**training: Any) -> str:
        run.config["training"] = {**plain, **training}
        return str(json.loads(run("fingerprint", "train"))["fingerprint"])

    plain = dict(run.config["training"])
    same = [{}, {"evalSteps": 2}, {"evalSteps": 3, "evalRows": 5, "earlyStoppingThreshold": 0.0}]
    assert len({fingerprint(**each) for each in same}) == 1
    best = {"evalSteps": 2, "loadBestModelAtEnd": True}
    other = [{}, best, {**best, "evalSteps": 3}, {**best, "evalRows": 5}, {"evalSteps": 2, "earlyStoppingPatience": 1}]
    assert len({fingerprint(**each) for each in other}) == len(other)
    assert fingerprint(**best) == fingerprint(**best, saveSteps=77)


def test_no_held_out_rows_are_found_by_tokenize_and_before_any_worker_starts(new_run: Callable[..., Run]) -> None:
    settings: dict[str, Any] = {"dataset": {"evalFraction": 0.0}, "evaluation": {"enabled": False}}
    said = new_run("first", training={"evalSteps": 2}, **settings)("tokenize", status=2)
    assert "dataset.evalFraction" in said and "remove training.evalSteps" in said
    run = prepared(new_run("second", **settings))
    run.config["training"]["evalSteps"] = 2
    said = run("train", status=2)
    assert "training.evalSteps: requires held-out rows" in said and "training:" not in said


def test_a_rehearsal_and_an_acceptance_run_measure_nothing_and_take_all_their_steps(
    new_run: Callable[..., Run],
) -> None:
    from llama_lora.acceptance_trainings import settings as acceptance_settings
    from llama_lora.small_run import small_config

    config = new_run(training={"evalSteps": 1, "loadBestModelAtEnd": True, "earlyStoppingPatience": 1}).load()
    for changed in (small_config(config).training, acceptance_settings(config).training):
        assert changed.eval_steps is None and not changed.depends_on_held_out_loss


def test_the_time_of_a_measurement_does_not_lower_the_tokens_per_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llama_lora import runlog
    from llama_lora.paths import Paths

    clock = [100.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: clock[0])
    paths = Paths(tmp_path, "run")
    log = runlog.RunLog(paths, "f" * 16, total_steps=4, first_step=0, rows_done=0)
    for step in range(1, 5):
        clock[0] += 2
        log.step(runlog.StepMetrics(step, 1.0, 1e-3, 1.0, tokens=100, trained_tokens=50, rows_done=step))
        clock[0] += 60
        log.held_out(runlog.HeldOutMetrics(step, 1.5, 8, 80, step), seconds=60)
    log.close()
    speeds = [step["tokens_per_second"] for step in read_metrics(paths.metrics("f" * 16))]
    assert speeds == [50.0] * 4
    assert [point["eval_loss"] for point in read_held_out(paths.metrics("f" * 16))] == [1.5] * 4


def training(**settings: Any) -> Training:
    return Training(**{"eval_steps": 1, **settings})


@given(st.lists(st.floats(0, 10), min_size=1), st.floats(0, 1), st.integers(1, 4))
def test_patience_counts_measurements_as_transformers_does(
    losses: list[float], threshold: float, patience: int
) -> None:
    """EarlyStoppingCallback compares with the best metric of the trainer's state, which is updated after it."""
    from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

    arguments = TrainingArguments(output_dir="unused", metric_for_best_model="loss", greater_is_better=False)
    callback = EarlyStoppingCallback(patience, threshold)
    trainer_state, control, state = TrainerState(), TrainerControl(), HeldOutState()
    settings = training(early_stopping_patience=patience, early_stopping_threshold=threshold)
    for step, loss in enumerate(losses, start=1):
        callback.check_metric_value(arguments, trainer_state, control, loss)
        if trainer_state.best_metric is None or loss < trainer_state.best_metric:
            trainer_state.best_metric = loss
        state = state.after(loss, step, 4 * step, threshold)
        assert state.best_loss == trainer_state.best_metric
        assert state.ends(settings) == (callback.early_stopping_patience_counter >= patience)
    assert state.best_rows_done == 4 * (losses.index(min(losses)) + 1)
    assert as_record(json.loads(json.dumps(asdict(state))), HeldOutState) == state


@given(rows=st.integers(1, 40), size=st.integers(1, 5), batch=st.integers(1, 4))
def test_copies_share_the_rows_and_are_asked_equally_often(rows: int, size: int, batch: int) -> None:
    numbered = [{"number": number} for number in range(rows)]
    shares = [list(shares_of(numbered, rank, size, batch)) for rank in range(size)]
    assert {len(share) for share in shares} == {math.ceil(rows / (size * batch))}
    given_out = [row["number"] for share in shares for part in share for row in part if row]
    assert sorted(given_out) == list(range(rows))
    assert all(1 <= len(part) <= batch for share in shares for part in share)


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    rows = [{"input_ids": [1, 2], "labels": [1, 2], "lengths": [2]}]
    with pytest.raises(UserError) as caught:
        HeldOutLoss(rows, Engine(), Workers(), training()).measure(3)  # type: ignore[arg-type]
    assert caught.value.where == "training.learningRate" and "step 3" in caught.value.what
    with pytest.raises(UserError) as caught:
        HeldOutLoss(rows, Engine(), Workers(), training()).measure(0)  # type: ignore[arg-type]
    assert caught.value.where == "model", "before the first step no learning rate has had an effect"


@pytest.mark.parametrize("loss", ["1" + "0" * 400, "NaN", "1e999", "null"])
def test_a_line_with_a_loss_that_is_no_finite_float_is_left_out(tmp_path: Path, loss: str) -> None:
    line = '{"step": 1, "eval_loss": LOSS, "eval_rows": 1, "eval_tokens": 1, "rows_done": 1}\n'
    file = tmp_path / "metrics.jsonl"
    file.write_text(line.replace("LOSS", loss) + line.replace("LOSS", "1.5"))
    assert [point["eval_loss"] for point in read_held_out(file)] == [1.5]
