"""A training that is told to stop saves, ends with status 143, and goes on as if nothing had happened; what hangs says
where."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forked import run_forked
from genvalues.common import files
from llama_lora.backends import launch, stopping
from trainer.conftest import TWO_PROCESSES, Run
from trainer.test_training import adapter_digest, free_port, losses, prepared, train_command, wait_for, worker_pids
from trainer.warm import WarmPopen

pytestmark = pytest.mark.long

LONG: dict[str, Any] = {"training": {"maxSteps": 5000, "saveSteps": 5000}, "parallelism": TWO_PROCESSES}


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """A test that fails leaves no trainer behind; workers die with theirs."""
    yield
    for trainer in STARTED:
        trainer.kill()
        trainer.wait()
    STARTED.clear()


def start(run: Run, **environment: str) -> subprocess.Popen[str]:
    return started(train_command(run), **environment)


def started(command: list[str], **environment: str) -> subprocess.Popen[str]:
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    STARTED.append(WarmPopen(command, env={**os.environ, **environment}, **streams))
    return STARTED[-1]


def end(trainer: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str]:
    said, _ = trainer.communicate(timeout=seconds)
    return trainer.returncode, said


def saved_steps(run: Run) -> list[int]:
    return sorted(int(record.parent.name[-6:]) for record in run.paths.run.glob("checkpoints/*/step-*/checkpoint.json"))


def step_of(run: Run) -> int:
    """The step that progress.json tells of."""
    try:
        return int(json.loads(run.paths.progress.read_text(encoding="utf-8"))["step"])
    except FileNotFoundError:
        return 0


def without_training(run: Run, name: str) -> Run:
    """The run as it was before train."""
    copy = run.copy(run.folder.parent / name)
    shutil.rmtree(copy.paths.run / "checkpoints")
    copy.paths.manifest("train").unlink()
    copy.paths.progress.unlink()
    return copy


def test_a_training_that_is_told_to_stop_saves_and_goes_on_as_if_it_had_not_been(new_run: Callable[..., Run]) -> None:
    """By two workers, with dropout on, at a step at which nothing would have been saved."""
    settings: dict[str, Any] = {
        "lora": {"dropout": 0.1},
        "training": {"maxSteps": 60, "saveSteps": 1000},
        "parallelism": TWO_PROCESSES,
    }
    undisturbed = prepared(new_run("undisturbed", **settings))
    undisturbed("train")
    stopped = without_training(undisturbed, "stopped")
    trainer = start(stopped)
    wait_for(lambda: step_of(stopped) >= 2)
    trainer.send_signal(signal.SIGTERM)
    status, said = end(trainer)
    assert status == 143, said
    assert not stopped.paths.manifest("train").exists()
    (step,) = saved_steps(stopped)
    assert 2 <= step < 60 and f"train: stopped as asked, with step {step} of 60 saved" in said
    assert "Traceback" not in said

    assert f"step-{step:06d}" in stopped("train")
    assert losses(stopped) == losses(undisturbed)
    assert adapter_digest(stopped) == adapter_digest(undisturbed)
    assert not stopped.paths.stacks.exists(), "a training that ends well leaves no stacks"


def test_one_worker_alone_can_be_asked_and_all_stop_at_the_same_step(new_run: Callable[..., Run]) -> None:
    """The one with the higher rank, so that nothing depends on the first."""
    run = prepared(new_run(**LONG))
    trainer = start(run)
    wait_for(run.paths.progress.exists)
    os.kill(worker_pids(trainer.pid)[1], stopping.STOP_SIGNAL)
    status, said = end(trainer)
    assert status == 143, said
    assert len(saved_steps(run)) == 1


def test_a_node_that_was_not_told_stops_with_the_one_that_was(new_run: Callable[..., Run]) -> None:
    """As when one of two nodes is drained: the other's container is started again, and both go on."""
    run = prepared(new_run(training={"maxSteps": 5000, "saveSteps": 5000}))
    run.config["parallelism"] = {"nodes": 2, "processesPerNode": 1, "tensorParallelSize": 1, "dataParallelSize": 2}
    rendezvous = {
        "PET_NNODES": "2:2",
        "PET_NPROC_PER_NODE": "1",
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": f"localhost:{free_port()}",
        "PET_LOCAL_ADDR": "127.0.0.1",
    }
    nodes = [start(run, **rendezvous) for _ in range(2)]
    wait_for(lambda: step_of(run) >= 1)
    nodes[1].send_signal(signal.SIGTERM)
    assert [end(node)[0] for node in nodes] == [143, 143]
    assert len(saved_steps(run)) == 1


def test_a_stop_during_a_save_leaves_that_one_whole(new_run: Callable[..., Run]) -> None:
    """Told in the middle of writing: the checkpoint gets its name, and nothing else is saved."""
    run = prepared(new_run(training={"maxSteps": 5000, "saveSteps": 3}, parallelism=TWO_PROCESSES))
    patched = trainer_with(
        run,
        "import time; from llama_lora.backends.native.engine import NativeEngine; save = NativeEngine.save\n"
        "def slow(self, folder): time.sleep(2); save(self, folder)\n"
        "NativeEngine.save = slow\n",
    )
    wait_for(lambda: step_of(run) == 3)
    time.sleep(0.5)
    patched.send_signal(signal.SIGTERM)
    status, said = end(patched)
    assert status == 143, said
    assert saved_steps(run) == [3]


def test_before_the_first_step_there_is_nothing_to_save_and_it_ends_quickly(new_run: Callable[..., Run]) -> None:
    """While the workers still read the model, of which one would not come to an end."""
    run = prepared(new_run(**LONG))
    trainer = trainer_with(
        run,
        "import time; from llama_lora.backends.native.engine import NativeEngine\n"
        "def reading_the_model(*arguments): time.sleep(600)\n"
        "NativeEngine.__init__ = reading_the_model\n",
    )
    wait_for(lambda: len(list(run.paths.stacks.glob("*.txt"))) == 2)
    time.sleep(1)
    began = time.monotonic()
    trainer.send_signal(signal.SIGTERM)
    status, said = end(trainer)
    assert status == 143, said
    assert time.monotonic() - began < 10
    assert not saved_steps(run) and not run.paths.manifest("train").exists()
    assert "reading_the_model" in run.paths.worker_stacks("train", 0).read_text(encoding="utf-8")


def test_before_the_workers_have_met_it_ends_quickly(new_run: Callable[..., Run]) -> None:
    """The other node never comes."""
    run = prepared(new_run(**LONG))
    port = free_port()
    trainer = start(run, PET_NNODES="2:2", PET_RDZV_BACKEND="c10d", PET_RDZV_ENDPOINT=f"localhost:{port}")
    wait_for(lambda: is_listening(port))
    time.sleep(1)
    assert trainer.poll() is None and not worker_pids(trainer.pid)
    began = time.monotonic()
    trainer.send_signal(signal.SIGTERM)
    status, said = end(trainer)
    assert status == 143, said
    assert time.monotonic() - began < 10 and "Traceback" not in said


def is_listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("localhost", port)) == 0


def test_a_dry_run_ends_at_once_and_does_not_count(new_run: Callable[..., Run]) -> None:
    run = new_run(parallelism=TWO_PROCESSES)
    run("tokenize")
    trainer = trainer_with(
        run,
        "import time; from llama_lora.backends.native.engine import NativeEngine; step = NativeEngine.step\n"
        "def slow(*arguments): time.sleep(1); return step(*arguments)\n"
        "NativeEngine.step = slow\n",
        stage="compile",
    )
    wait_for(lambda: len(list(run.paths.stacks.glob("compile-rank-*.txt"))) == 2)
    time.sleep(3)
    began = time.monotonic()
    trainer.send_signal(signal.SIGTERM)
    status, said = end(trainer)
    assert status == 143, said
    assert time.monotonic() - began < 8
    assert not run.paths.manifest("compile").exists() and not saved_steps(run)


def test_a_worker_that_hangs_leaves_its_stack_and_is_killed(new_run: Callable[..., Run]) -> None:
    """Rank 1 never comes to the third step; rank 0 waits for it in C, where no handler of Python's is run."""
    run = prepared(new_run(**LONG))
    stale = run.paths.worker_stacks("train", 7)
    stale.parent.mkdir()
    stale.write_text("of eight workers, once", encoding="utf-8")
    run.paths.worker_stacks("train", 0).write_text("an earlier one's", encoding="utf-8")
    trainer = trainer_with(
        run,
        "import os, time; from llama_lora.backends.native.engine import NativeEngine; take = NativeEngine.step\n"
        "def waiting_for_a_lost_friend(): time.sleep(600)\n"
        "def step(self, number, *rest):\n"
        "    if number == 2 and os.environ['RANK'] == '1': waiting_for_a_lost_friend()\n"
        "    return take(self, number, *rest)\n"
        "NativeEngine.step = step\n",
        launcher="stopping.grace_period = lambda: 14\n",
    )
    wait_for(lambda: step_of(run) == 2)
    time.sleep(1)
    began = time.monotonic()
    trainer.send_signal(signal.SIGTERM)
    status, said = end(trainer)
    assert status == 143, said
    assert 4 <= time.monotonic() - began < 12, "4 s to end, and then no longer"
    hung, waiting = (run.paths.worker_stacks("train", rank).read_text(encoding="utf-8") for rank in (1, 0))
    assert "waiting_for_a_lost_friend" in hung
    assert "_sum_over_copies" in waiting and "all_reduce" in waiting and "an earlier one's" not in waiting
    assert not stale.exists()
    assert not run.paths.manifest("train").exists()


def trainer_with(run: Run, worker: str, launcher: str = "", stage: str = "train") -> subprocess.Popen[str]:
    """The stage, with code that each worker runs before its work, and the launcher before its own."""
    patched = run.folder / "patched_worker.py"
    patched.write_text(f"import sys\n{worker}\nfrom llama_lora.backends.worker import main\nmain(*sys.argv[1:])\n")
    config = run.write_config()
    code = (
        "import sys; from pathlib import Path\n"
        "from llama_lora.backends import launch, stopping\nfrom llama_lora.cli import main\n"
        f"{launcher}"
        "import llama_lora.stages.train as train, llama_lora.backends.native.backend as native\n"
        "def command(stage, paths): return "
        f"[sys.executable, {str(patched)!r}, stage, str(paths.config), str(paths.workspace)]\n"
        "train.worker_command = native.worker_command = command\n"
        f"main([{stage!r}, '--config', {str(config)!r}, '--workspace', {str(run.workspace)!r}])\n"
    )
    return started([sys.executable, "-c", code])


def test_a_training_that_fails_is_not_one_that_was_stopped() -> None:
    """What gate and people make of the statuses depends on it."""
    assert stopping.EXIT_STOPPED == 143 and stopping.EXIT_STOPPED not in (0, 1, 2)
    assert stopping.MARGIN > launch.WAIT_WITHOUT_WORKERS + launch.POLL_INTERVAL


@pytest.mark.parametrize("stage", ["tokenize"])
def test_any_stage_ends_when_it_is_told_to(new_run: Callable[..., Run], stage: str) -> None:
    """As process 1 of a container it would ignore SIGTERM, and cost its pod the whole grace period."""
    run = new_run()
    arguments = [stage, "--config", str(run.write_config()), "--workspace", str(run.workspace)]
    code = (
        "import os, signal; from llama_lora import stage; from llama_lora.cli import main\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "def told(*arguments): os.kill(os.getpid(), signal.SIGTERM); print('goes on')\n"
        f"stage.run_stage = told\nmain({arguments!r})\n"
    )
    ended = run_forked([sys.executable, "-c", code])
    assert (ended.returncode, ended.stdout) == (143, ""), ended.stderr
    assert not re.search("Traceback", ended.stderr)


def test_a_stop_is_a_stop_also_if_torchrun_does_not_find_a_worker_that_it_ended() -> None:
    """torchrun asks for a worker's process group, and the worker, which had nothing to save yet, is gone."""
    code = (
        "import os, signal, time\nfrom types import SimpleNamespace\n"
        "from torch.distributed.launcher import api\nfrom llama_lora.backends import launch\n"
        "def ends(*workers):\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(1); raise ProcessLookupError(3, 'No such process')\n"
        "api.elastic_launch = lambda *arguments: ends\n"
        "launch.run_workers(['true'], SimpleNamespace(parallelism=SimpleNamespace(processes_per_node=2)))\n"
    )
    ended = run_forked([sys.executable, "-c", code])
    assert ended.returncode == 143 and "Traceback" not in ended.stderr, ended.stderr


def test_a_folder_of_stack_traces_that_another_worker_deletes_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "stacks" / "train-rank-1.txt"
    deletions = iter([True, True, False])
    opened = files.open_to_append

    def delete_and_open(path: Path, **options: Any) -> Any:
        if next(deletions):
            path.parent.rmdir()  # as a worker that ends does between the two calls
        return opened(path, **options)

    monkeypatch.setattr(files, "open_to_append", delete_and_open)
    with stopping.write_stacks_to(file):
        assert file.exists()
    assert not file.parent.exists()
