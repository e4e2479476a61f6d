"""How a stage fails: one line for any error, the failure that caused the others, and the exit status."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from forked import run_forked
from genvalues.common.errors import Unavailable, UserError, VolumeError
from genvalues.common.streams import open_closed_streams
from genvalues.common.system_errors import explain, room
from llama_lora import cli, environment, library_versions, stage
from llama_lora.backends import failures
from llama_lora.preview import wants_color
from trainer.conftest import TWO_PROCESSES, Run
from trainer.test_resolve import FakeHub
from trainer.test_stopping import end, start, step_of, trainer_with
from trainer.test_training import prepared, wait_for, worker_pids


def ended_by(run: Run, error: BaseException, patch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    """The status and the lines of a stage that raises the error."""

    def crash(*arguments: Any) -> None:
        raise error

    patch.setattr(stage, "run_stage", crash)
    arguments = ["tokenize", "--config", str(run.write_config()), "--workspace", str(run.workspace)]
    ended = CliRunner().invoke(cli.main, arguments)
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
    return ended.exit_code, ended.output.splitlines()


def system_error(number: int, *path: str) -> OSError:
    return OSError(number, os.strerror(number), *path)


# What numpy, Rust's tokenizers and safetensors, and pyarrow raise on a full disk.
WRAPPED = [
    RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"),
    Exception("No space left on device (os error 28)"),
    RuntimeError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
]


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyError("hidden_size"), 1, ["llama-lora: internal error: KeyError", "GENVALUES_TRACEBACK=1"]),
        (RecursionError("maximum recursion depth"), 1, ["RecursionError"]),
        (ZeroDivisionError(), 1, ["ZeroDivisionError at cli.py:"]),
        (MemoryError(), 1, ["out of memory", "resources.limits.memory"]),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, ["out of memory"]),
        (KeyboardInterrupt(), 130, []),
        (UserError("is wrong", where="lora.r", fix="Lower it."), 2, ["lora.r: is wrong. Lower it."]),
        (Unavailable("the Hub does not respond"), 1, ["the Hub does not respond"]),
        (system_error(errno.ENOENT, "/w/gone"), 1, ["/w/gone: No such file"]),
        *((system_error(number, "/w/x"), 75, ["/w/x: ", os.strerror(number)]) for number in (28, 122, 30, 5, 24)),
        *((system_error(number, "/w/x"), 2, ["/w/x: ", os.strerror(number)]) for number in (13, 1, 20, 21, 40, 36)),
        *((error, 75, ["runs/run: cannot be written: No space left on device"]) for error in WRAPPED),
    ],
)
def test_every_error_is_one_line_with_its_status(
    new_run: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
    words: list[str],
) -> None:
    code, lines = ended_by(new_run(), error, monkeypatch)
    assert code == status, lines
    assert len(lines) == (1 if words else 0), lines
    assert all(word in lines[0] for word in words), lines


def test_a_stdout_or_stderr_that_cannot_be_written_does_not_change_the_status(new_run: Callable[..., Run]) -> None:
    run = new_run()
    run("tokenize")  # below it is skipped, and ends in the same way
    options = f"--config {run.write_config()} --workspace {run.workspace}"
    for arguments, status in [
        (f"tokenize {options} >&-", 0),
        (f"tokenize {options} <&- >&- 2>&-", 0),
        ("tokenize --config absent 2>&-", 2),
        ("tokenize --config absent 2</dev/null", 2),  # as in a script that a shell has opened in place of stderr
        ("tokenize --config absent 2>/dev/full", 2),
        ("nonsense 2>/dev/full", 2),
    ]:
        command = ["sh", "-c", f'"{sys.executable}" -m llama_lora.cli {arguments}']
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (status, ""), (arguments, done.stderr)


def test_a_preview_without_stdout_has_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    open_closed_streams()
    assert not wants_color()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; int(os.environ['HF_A_TIMEOUT'])", "ValueError: invalid literal for int() with base 10: 'abc'"),
        ("raise ImportError('lib.so: failed to map segment')", "ulimit -v"),
        ("import no_library", "No module named 'no_library'. Check the installation"),
    ],
)
def test_a_library_that_cannot_be_imported_is_named_with_the_variable_at_fault(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, words: str
) -> None:
    monkeypatch.setenv("HF_A_TIMEOUT", "abc")
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    (tmp_path / "site-packages/a_library").mkdir(parents=True)
    (tmp_path / "site-packages/a_library/__init__.py").write_text(code)
    run = new_run()
    for module, name in (
        (stage, "run_stage"),
        (library_versions, "import_tokenizers"),
        (library_versions, "import_models"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *_: importlib.import_module("a_library"))
            said = run("tokenize", status=2)
        line = said.splitlines()[-1]
        assert line.startswith("a_library: cannot be imported: ") and words in line
        assert ("variable HF_A_TIMEOUT." in line) == ("'abc'" in line)
        shutil.rmtree(run.workspace)


@pytest.mark.parametrize(("ending", "status"), [(SystemExit(143), 143), (KeyboardInterrupt(), 130)])
def test_an_end_by_a_signal_that_an_import_made_an_error_keeps_its_status(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, ending: BaseException, status: int
) -> None:
    """As before Python 3.12: RuntimeError: Error calling __set_name__ on 'Field' instance."""

    def imported(*_: Any) -> None:
        raise RuntimeError("Error calling __set_name__") from ending

    monkeypatch.setattr(stage, "run_stage", imported)
    assert "cannot be imported" not in new_run()("tokenize", status=status)


@pytest.mark.parametrize("variable", ["GENVALUES_TRACEBACK", "KUBERNETES_SERVICE_HOST"])
def test_the_traceback_is_above_the_line_on_request_and_in_a_pod(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    code, lines = ended_by(new_run(), KeyError("hf_" + "a" * 34), monkeypatch)
    assert code == 1 and lines[0].startswith("Traceback") and lines[-1].startswith("llama-lora: internal error")
    assert "hf_aaaa" not in "".join(lines)


def test_a_full_volume_says_what_was_needed_and_what_is_free(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run()
    code, (line,) = ended_by(run, system_error(errno.ENOSPC), monkeypatch)
    assert code == 75
    assert line.startswith(f"{run.paths.run}: cannot be written: No space left on device. tokenize needs about ")
    assert " kB for the model. " in line and " are free there. " in line and "storage.size" in line
    assert "inodes" in room(Path("/dev/shm")), "a tmpfs has a limit of files"


def test_in_a_pod_a_stage_pauses_before_it_ends_with_75_and_elsewhere_it_does_not(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    paused: list[float] = []
    monkeypatch.setattr(time, "sleep", paused.append)
    full = system_error(errno.ENOSPC, "/w/x")
    assert ended_by(new_run(), full, monkeypatch)[0] == 75 and paused == []
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert ended_by(new_run(), KeyError(1), monkeypatch)[0] == 1 and paused == []
    assert ended_by(new_run(), full, monkeypatch)[0] == 75 and paused == [cli.PAUSE_IN_POD]


def test_the_number_of_an_error_is_found_below_the_exceptions_of_libraries() -> None:
    from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

    assert isinstance(
        explain(CheckpointException("save", {1: _wrap_exception(system_error(errno.EDQUOT))})), VolumeError
    )
    try:
        try:
            raise system_error(errno.EROFS, "/w/x")
        except OSError:
            raise ValueError("the writer failed")  # noqa: B904
    except ValueError as error:
        assert "/w/x" in str(explain(error))
    assert explain(ValueError("no error of the operating system")) is None


FOUR = {"processesPerNode": 4, "dataParallelSize": 4}


@pytest.mark.parametrize(("number", "name"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGSEGV, "SIGSEGV")])
def test_a_killed_worker_is_reported_by_rank_and_signal_alone(
    new_run: Callable[..., Run], number: signal.Signals, name: str
) -> None:
    """The other workers lose their connection to it. What they would print hides the cause."""
    run = prepared(new_run(training={"maxSteps": 5000, "gradientAccumulationSteps": 1}, parallelism=FOUR))
    trainer = start(run)
    wait_for(lambda: step_of(run) >= 1)
    os.kill(worker_pids(trainer.pid)[3], number)
    status, said = end(trainer)
    assert status == 1
    assert f"worker 3 was ended by signal {int(number)} ({name}). " in said.splitlines()[-1]
    assert ("resources.limits.memory" in said) == (number == signal.SIGKILL)
    assert not [word for word in ("Traceback", "gloo", "Connection", "worker 0", "worker 1") if word in said], said


def raising(run: Run, code: str, **environment: str) -> tuple[int, list[str]]:
    """Train with two workers, of which rank 1 runs the code in its third step; the status and the last lines."""
    patch = (
        "import os; from llama_lora.backends.native.engine import NativeEngine; take = NativeEngine.step\n"
        "def step(self, number, *rest):\n"
        f"    if number == 2 and os.environ['RANK'] == '1':\n        {code}\n"
        "    return take(self, number, *rest)\n"
        "NativeEngine.step = step\n"
    )
    for name, value in environment.items():
        os.environ[name] = value
    try:
        status, said = end(trainer_with(run, patch))
    finally:
        for name in environment:
            del os.environ[name]
    return status, said.splitlines()


def test_the_worker_that_failed_is_reported_in_one_line_and_those_that_lost_it_are_not(
    new_run: Callable[..., Run],
) -> None:
    run = prepared(new_run(training={"maxSteps": 5000}, parallelism=TWO_PROCESSES))
    status, lines = raising(run, "raise KeyError('no such thing')")
    assert status == 1
    assert lines[-1].startswith("worker 1: llama-lora: internal error: KeyError at ") and "no such thing" in lines[-1]
    assert not [line for line in lines if "Traceback" in line or "gloo" in line], lines
    status, lines = raising(run, "raise KeyError('no such thing')", GENVALUES_TRACEBACK="1")
    assert status == 1 and sum("Traceback" in line for line in lines) == 1


def test_a_full_volume_in_one_worker_is_the_status_of_the_stage(new_run: Callable[..., Run]) -> None:
    run = prepared(new_run(training={"maxSteps": 5000}, parallelism=TWO_PROCESSES))
    status, lines = raising(run, "raise OSError(28, 'No space left on device')")
    assert status == 75
    assert "No space left on device" in lines[-1] and not [line for line in lines if "Traceback" in line]


def test_a_save_that_fails_in_one_worker_leaves_nothing_of_the_checkpoint(new_run: Callable[..., Run]) -> None:
    run = prepared(new_run(training={"maxSteps": 6, "saveSteps": 2}, parallelism=TWO_PROCESSES))
    patch = (
        "import os; from llama_lora.backends.native.engine import NativeEngine; save = NativeEngine.save\n"
        "def full(self, folder):\n"
        "    save(self, folder)\n"
        "    if os.environ['RANK'] == '1' and '000004' in str(folder): raise OSError(28, 'No space left on device')\n"
        "NativeEngine.save = full\n"
    )
    status, said = end(trainer_with(run, patch))
    assert status == 75 and "No space left on device" in said.splitlines()[-1], said
    assert [path.name for path in run.paths.run.glob("checkpoints/*/*step-*")] == ["step-000002"]
    assert "resuming from" in run("train")


def test_the_cause_is_chosen_among_what_workers_recorded(tmp_path: Path) -> None:
    """By kind first: a connection is lost before the one who caused it has said why."""
    lost = failures.failure_of(RuntimeError("[gloo/pair.cc:544] Connection closed by peer"), tmp_path, 0)
    assert lost.kind == failures.CONNECTION
    own = failures.failure_of(IndexError("x"), tmp_path, 1)
    assert "worker 1: " in str(failures.cause([lost, own], {0: 1, 1: 1}))
    assert "worker 0 lost the connection" in str(failures.cause([lost], {0: 1, 1: -signal.SIGTERM}))
    assert "workers 1 and 2 were ended by signal 9" in str(failures.cause([lost], {0: 1, 1: -9, 2: -9, 3: -15}))
    assert "worker 1 was ended by signal 15" in str(failures.cause([], {1: -15}))
    assert "worker 2 ended with status 7" in str(failures.cause([], {2: 7, 3: -15}))
    for failure in (lost, own):
        failures.record(failure, tmp_path)
    assert failures.read(tmp_path) == [lost, own]
    failures.record(own, tmp_path / "absent")  # a full /tmp: it is printed


def test_an_internal_error_ends_the_real_command_with_one_line(new_run: Callable[..., Run]) -> None:
    run = new_run()
    command = ["tokenize", "--config", str(run.write_config()), "--workspace", str(run.workspace)]
    code = (
        "from llama_lora import stage; from llama_lora.cli import main\n"
        "def crash(*arguments): raise AttributeError('broken')\n"
        f"stage.run_stage = crash; main({command!r})\n"
    )
    done = run_forked([sys.executable, "-c", code])
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("llama-lora: internal error: AttributeError at ") and "broken" in line


def test_a_hub_that_does_not_answer_is_given_up(new_run: Callable[..., Run], tiny_model: Path) -> None:
    """huggingface_hub itself waits without end for an answer about a repository."""
    hub = FakeHub(tiny_model)
    hub.answer = lambda path: time.sleep(600)  # type: ignore[assignment, method-assign]
    run = new_run()
    run.config["model"] = {"id": "org/thing", "revision": "main"}
    began = time.monotonic()
    try:
        said = run("tokenize", status=1, HF_HUB_DOWNLOAD_TIMEOUT="1", **hub.environment)
    finally:
        hub.server.shutdown()
    assert time.monotonic() - began < 60
    assert "org/thing: the Hugging Face Hub cannot be reached" in said.splitlines()[-1]


@pytest.mark.parametrize("value", ["", "loud", "1e9"])
def test_a_verbosity_that_is_no_number_is_the_default(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.VERBOSITY, value)
    assert environment.verbosity() == 0
