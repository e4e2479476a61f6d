"""Stages as forks of one `llama-lora fork-server`, which imports the trainer's libraries once for all of them.

A request is one message on a socket: the command as JSON, with two file descriptors: for the stage's output, and for
the id of its supervisor's process. That process becomes a child of this one, so it is stopped and waited for like any
other. The other end is llama_lora/forks.py.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

from genvalues.common import process
from genvalues.common.process import Command, Process

# Variables that stages read when they use them. Libraries read others when they are imported: a stage in which one of
# these differs gets a server of its own.
READ_WHEN_USED = re.compile(r"PET_.*|LLAMA_LORA_.*|HF_TOKEN|HUGGING_?FACE_?HUB_TOKEN")


class Forks:
    """Starts commands: those of the ``trainer`` as forks where that is safe, on Linux.

    All hold the file descriptor ``lock`` open until the last process has ended.
    """

    def __init__(self, trainer: Path, lock: int) -> None:
        self._trainer = str(trainer)
        self._lock = lock
        self._server: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket
        self._environment: dict[str, str] = {}

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def start(self, command: Command) -> Process:
        """Start a command's supervisor."""
        if sys.platform != "linux" or command.arguments[0] != self._trainer:
            return process.start(command, hold_open=[self._lock])
        fixed = {key: value for key, value in command.environment.items() if not READ_WHEN_USED.fullmatch(key)}
        if self._server is None or self._server.poll() is not None or fixed != self._environment:
            self._stop()
            self._start(fixed)
        assert self._server is not None
        request = {
            "parent": os.getpid(),
            "grace": command.grace,
            "arguments": command.arguments,
            "environment": {key: value for key, value in command.environment.items() if key not in fixed},
            "folder": str(command.folder),
        }
        (reading, output), (answer, pid) = os.pipe(), os.pipe()
        try:
            with suppress(BrokenPipeError):  # the server was killed; so the stage is
                socket.send_fds(self._requests, [json.dumps(request).encode()], [output, pid])
        finally:
            os.close(output)
            os.close(pid)
        return Fork(self._server, answer, os.fdopen(reading, "rb"))

    def _start(self, environment: dict[str, str]) -> None:
        process.prctl(process.PR_SET_CHILD_SUBREAPER, 1)  # this process adopts the forks, whose parent exits
        self._environment = environment
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                [self._trainer, "fork-server"],
                env=environment,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=[self._lock],
            )

    def _stop(self) -> None:
        if self._server is not None:
            self._requests.close()
            self._server.kill()
            self._server.wait()
            self._server = None


class Fork:
    """A supervisor that the server forks once it has imported the libraries."""

    def __init__(self, server: subprocess.Popen[bytes], answer: int, stdout: IO[bytes]) -> None:
        self.stdout = stdout
        self._server = server
        self._answer = answer
        self._pid: int | None = None

    def send_signal(self, number: int) -> None:
        """Send a signal; before there is a process, end the server."""
        if self._pid is None and not select.select([self._answer], [], [], 0)[0]:
            self._server.kill()
        elif pid := self._read_pid():
            os.kill(pid, number)

    def wait(self) -> int:
        """Its status, or minus the signal that ended it or the server."""
        pid = self._read_pid()
        os.close(self._answer)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if pid else -signal.SIGKILL

    def _read_pid(self) -> int:
        """The process id; 0 if the server ended before it."""
        if self._pid is None:
            self._pid = int(os.read(self._answer, 32) or 0)
        return self._pid
