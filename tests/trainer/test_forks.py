"""Stages as forks of `llama-lora fork-server`, which `genvalues local` starts."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from genvalues.common.locks import locked
from genvalues.common.process import Command, Interrupted, descendants, run_together
from genvalues.ops.local.forks import Forks
from llama_lora import forks
from trainer.conftest import LLAMA_LORA, Run
from trainer.warm import WarmPopen, warm_up

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each stage is a process of its own")


class Server:
    """What genvalues local runs stages with, the lines of their output, and how many servers there were."""

    def __init__(self, forks: Forks, started: list[str], folder: Path) -> None:
        self.forks, self.started, self.folder = forks, started, folder
        self.lines: list[str] = []

    def run(self, *arguments: str, on_line: Callable[[str], None] = lambda line: None, **environment: str) -> int:
        def hear(_: str, line: str) -> None:
            self.lines.append(line)
            on_line(line)

        command = Command("main", (LLAMA_LORA, *arguments), {**os.environ, **environment}, self.folder)
        return run_together([command], hear, self.forks.start)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    started: list[str] = []
    warm_up()  # otherwise a test's signal may interrupt it

    class Popen(WarmPopen):
        def __init__(self, command: list[str], **options: object) -> None:
            started.append(command[1])
            super().__init__(command, **options)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    with (tmp_path / "lock").open("w") as lock, Forks(Path(LLAMA_LORA), lock.fileno()) as found:
        yield Server(found, started, tmp_path)


def test_stages_that_follow_one_another_are_forks_of_one_server_with_their_own_status_and_output(
    server: Server, finished_run: Run
) -> None:
    options = ["--config", str(finished_run.write_config()), "--workspace", str(finished_run.workspace)]
    (finished_run.paths.manifest("merge")).unlink()
    assert server.run("tokenize", *options, LLAMA_LORA_WORKSPACE="/ignored") == 0
    assert server.run("merge", *options) == 0
    assert server.run("merge", "--config", "none.yaml") == 2
    assert server.started == ["fork-server"]
    text = "\n".join(server.lines)
    assert "tokenize: nothing changed, skipped" in text and "merged " in text and "no workspace" in text
    assert len(descendants()) == 1, "the server"
    assert finished_run.manifest("merge")["stage"] == "merge"


def test_a_stage_does_not_end_what_the_server_began(server: Server) -> None:
    """Such as its temporary folders: this test is the server's parent, with one more function for its exit."""
    mark = server.folder / "ended"
    atexit.register(mark.touch)
    try:
        assert server.run("--version") == 0
    finally:
        atexit.unregister(mark.touch)
    assert not mark.exists()


def test_a_variable_that_a_library_may_read_when_it_is_imported_starts_another_server(server: Server) -> None:
    for environment in (
        {},
        {"PET_NNODES": "1:1"},
        {"HF_TOKEN": "x"},
        {"OMP_NUM_THREADS": "3"},
        {"OMP_NUM_THREADS": "3"},
    ):
        assert server.run("--version", **environment) == 0
    assert len(server.started) == 2
    assert len(server.lines) == 5


def test_a_signal_stops_the_running_stage_and_leaves_no_process(server: Server, new_run: Callable[..., Run]) -> None:
    run = new_run()
    options = ["--config", str(run.write_config()), "--workspace", str(run.workspace)]
    with locked(run.paths.lock, "a test", 1), pytest.raises(Interrupted, match="SIGTERM"):
        server.run("tokenize", *options, on_line=lambda line: os.kill(os.getpid(), signal.SIGTERM))
    assert "waiting" in server.lines[0]
    assert len(descendants()) == 1, "the server"


def test_a_signal_during_the_imports_ends_the_server(
    server: Server, new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run()
    options = ["--config", str(run.write_config()), "--workspace", str(run.workspace)]
    monkeypatch.setattr(forks, "import_libraries", lambda: time.sleep(60))  # in the server too, a fork of this process
    before = signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 1)
    with pytest.raises(Interrupted, match="SIGINT"):
        server.run("merge", *options)
    signal.signal(signal.SIGALRM, before)
    assert not descendants()
    assert server.run("--version") == 0 and len(server.started) == 2


def test_a_stage_of_a_server_with_threads_is_executed_not_forked(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forks, "has_threads", lambda: True)  # in the server too, a fork of this process
    monkeypatch.setattr(forks, "execute", lambda arguments: os.execv("/bin/echo", ["echo", "executed", *arguments[1:]]))
    assert server.run("--version") == 0
    assert server.lines == ["executed --version"]


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("print('done')", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('wrong')", 1, "wrong"),
        ("1 / 0", 1, "division by zero"),
    ],
)
def test_a_fork_ends_as_python_does_but_frees_nothing(command: str, status: int, said: str) -> None:
    code = (
        "import atexit, sys\n"
        "from llama_lora.forks import run_to_exit\n"
        "class Kept:\n"
        "    def __del__(self): print('freed')\n"
        "kept = Kept()\n"
        "atexit.register(print, 'at exit')\n"
        f"run_to_exit(lambda: {command})\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == status
    assert ended.stdout.endswith("at exit\n"), "and not freed"
    assert ended.stderr.strip().endswith(said)
    assert bool(ended.stderr) == bool(said)
