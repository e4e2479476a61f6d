"""Processes that start with everything imported: forks of the test process, for tests that are about what a command
does and not about its start. An exec of ``genvalues`` takes half a second of a core, one of ``llama-lora`` six.

A fork is a process with its own environment, streams, signals and session, so it can be killed and waited for like any
other.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import logging
import os
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PR_SET_NAME = 15  # linux/prctl.h; at most 15 bytes, in /proc/PID/comm


class ForkedPopen(subprocess.Popen):  # type: ignore[type-arg]
    """``subprocess.Popen`` that forks for Python, ``llama-lora`` and ``genvalues``, and executes other programs."""

    def _execute_child(self, args: list[str], *given: Any) -> None:  # type: ignore[override]
        preexec_fn, _, pass_fds, cwd, env = given[1:6]
        streams = given[9:15]  # p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite
        start_new_session = given[20]  # the last before Python 3.11's process_group
        if args[0] != sys.executable and Path(args[0]).name not in ("llama-lora", "genvalues"):
            super()._execute_child(args, *given)  # type: ignore[misc]
            return
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if self.pid == 0:
            gc.freeze()  # a store of torchrun, collected here, would wait for its thread, which is not in the fork
            status = 1
            try:
                if start_new_session:
                    os.setsid()
                take_streams((streams[0], streams[3], streams[5]), pass_fds)
                start_anew(list(args), dict(os.environ if env is None else env), cwd)
                if preexec_fn:
                    preexec_fn()
                status = run_to_exit(list(args))
            finally:
                os._exit(status)
        self._child_created = True
        self._close_pipe_fds(*streams)  # type: ignore[attr-defined]


def run_forked(command: Sequence[str], timeout: float | None = 90, **options: Any) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` in a fork: text of both streams, and no standard input unless it is given."""
    streams = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE) | {"stdin": subprocess.DEVNULL}
    with ForkedPopen(command, text=True, **{**streams, **options}) as process:
        stdout, stderr = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def genvalues(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command with these arguments, in a fork."""
    return run_forked([sys.executable, "-m", "genvalues.cli", *arguments], **options)


def take_streams(streams: Sequence[int], kept: Sequence[int]) -> None:
    """Standard input, output and error, and none of the other file descriptors of the test process."""
    for target, descriptor in enumerate(streams):
        if descriptor not in (-1, target):
            os.dup2(descriptor, target)
    null = os.open(os.devnull, os.O_RDWR)
    for entry in sorted(Path("/proc/self/fd").iterdir()):  # replaced, not closed: objects that own one close it later
        if int(entry.name) not in (0, 1, 2, null, *kept) and entry.exists():
            os.dup2(null, int(entry.name))
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # type: ignore[misc]  # noqa: SIM115


def start_anew(args: list[str], env: dict[str, str], cwd: str | None) -> None:
    """Default signal handlers, environment and working directory, as after an exec."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    logging.getLogger().handlers.clear()  # pytest's
    warnings.simplefilter("ignore")  # of runpy: the module is imported already
    os.environ.clear()
    os.environ.update(env)
    read_hub_environment()
    if cwd is not None:
        os.chdir(cwd)
    ctypes.CDLL(None).prctl(PR_SET_NAME, process_name(args, env).encode(), 0, 0, 0)


def read_hub_environment() -> None:
    """Have huggingface_hub and datasets read $HF_ENDPOINT and others again, which they do when they are imported."""
    if "huggingface_hub.constants" not in sys.modules:
        return
    constants = vars(importlib.reload(sys.modules["huggingface_hub.constants"]))
    for name, module in list(sys.modules.items()):
        if name.startswith("huggingface_hub."):
            vars(module).update(
                {key: constants[key] for key in vars(module).keys() & constants.keys() if key.isupper()}
            )
    if "datasets.config" in sys.modules:
        importlib.reload(sys.modules["datasets.config"])


def process_name(args: Sequence[str], env: dict[str, str]) -> str:
    """What ``ps`` shows of it: a worker is worker-RANK."""
    return f"worker-{env['RANK']}" if "RANK" in env else Path(args[0]).name


def run_to_exit(args: list[str]) -> int:
    """Run the command in this process; its exit status."""
    program, *rest = args
    while rest[0] in ("-I", "-S"):
        del rest[0]
    try:
        if program != sys.executable:
            sys.argv = args
            importlib.import_module(f"{Path(program).name.replace('-', '_')}.cli").main()
        elif rest[0] == "-m":
            sys.argv = rest[1:]
            runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
        elif rest[0] == "-c":
            sys.argv = [rest[0], *rest[2:]]
            exec(compile(rest[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = rest
            runpy.run_path(rest[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return status
