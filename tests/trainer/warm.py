"""Processes that start with torch and transformers imported: forks of the test process, for tests that are about what
the trainer does and not about its start. The demo's tests start the installed commands.

A fork is a process with its own environment, streams, signals and session, so it can be killed and waited for like any
other. torchrun forks its workers from a forked launcher in the same way.
"""

from __future__ import annotations

import ctypes
import functools
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

import huggingface_hub.constants

PR_SET_NAME = 15  # linux/prctl.h; at most 15 bytes, in /proc/PID/comm


class WarmPopen(subprocess.Popen):  # type: ignore[type-arg]
    """``subprocess.Popen`` for ``python -m MODULE``, ``python -c CODE``, ``python FILE`` and ``llama-lora``."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        warm_up()
        super().__init__(*arguments, **options)

    def _execute_child(self, args: list[str], *given: Any) -> None:  # type: ignore[override]
        cwd, env = given[4:6]
        streams = given[9:15]  # p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite
        start_new_session = given[20]  # the last before Python 3.11's process_group
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                if start_new_session:
                    os.setsid()
                become(list(args), dict(os.environ if env is None else env), cwd, streams[0::2][:1] + streams[3::2])
                status = run_to_exit(list(args))
            finally:
                os._exit(status)
        self._child_created = True
        self._close_pipe_fds(*streams)  # type: ignore[attr-defined]


def become(args: list[str], env: dict[str, str], cwd: str | None, streams: Sequence[int]) -> None:
    """Give this fork what an exec would: environment, streams, default signal handlers, none of our descriptors."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for target, descriptor in enumerate(streams):
        if descriptor not in (-1, target):
            os.dup2(descriptor, target)
    null = os.open(os.devnull, os.O_RDWR)
    for entry in sorted(Path("/proc/self/fd").iterdir()):  # replaced, not closed: objects that own one close it later
        if int(entry.name) > 2 and int(entry.name) != null and entry.exists():
            os.dup2(null, int(entry.name))
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    logging.getLogger().handlers.clear()  # pytest's
    warnings.simplefilter("ignore")  # of runpy: the module is imported already
    os.environ.clear()
    os.environ.update(env)
    read_hub_environment()
    if cwd is not None:
        os.chdir(cwd)
    ctypes.CDLL(None).prctl(PR_SET_NAME, process_name(args, env).encode(), 0, 0, 0)


def read_hub_environment() -> None:
    """Have huggingface_hub read $HF_ENDPOINT and others again, which it does when it is imported."""
    constants = vars(importlib.reload(huggingface_hub.constants))
    for name, module in list(sys.modules.items()):
        if name.startswith("huggingface_hub."):
            vars(module).update(
                {key: constants[key] for key in vars(module).keys() & constants.keys() if key.isupper()}
            )


def process_name(args: Sequence[str], env: dict[str, str]) -> str:
    """What ``ps`` shows of it: a worker is worker-RANK."""
    return f"worker-{env['RANK']}" if "RANK" in env else Path(args[0]).name


def run_to_exit(args: list[str]) -> int:
    """Run the command in this process; its exit status."""
    try:
        if args[1] == "-m":
            sys.argv = args[2:]
            runpy.run_module(args[2], run_name="__main__", alter_sys=True)
        elif args[1] == "-c":
            sys.argv = args[1:2] + args[3:]
            exec(compile(args[2], "<string>", "exec"), {"__name__": "__main__"})
        elif args[0] == sys.executable:
            sys.argv = args[1:]
            runpy.run_path(args[1], run_name="__main__")
        else:
            from llama_lora.cli import main

            sys.argv = args
            main()
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


@functools.cache
def warm_up() -> None:
    """Import what workers import, and have torchrun fork its workers."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import llama_lora.backends.cpu
    import llama_lora.stages.compile
    import llama_lora.stages.train  # noqa: F401

    def popen(handler: Any, args: Sequence[str], env: dict[str, str]) -> WarmPopen:
        return WarmPopen(args, env=env, stdout=handler._stdout, stderr=handler._stderr, start_new_session=True)

    SubprocessHandler._popen = popen
