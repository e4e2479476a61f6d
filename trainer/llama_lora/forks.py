"""`llama-lora fork-server`: stages that follow one another on one computer, as forks of a process that imports once.

Each stage is a process of its own, with its own supervisor, output, environment and exit status, as if it had been
started. Sends the requests: genvalues/ops/local/forks.py.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from genvalues.common.process import PR_SET_PDEATHSIG, execute, prctl, supervise

MOST_BYTES = 1 << 18  # of a request
LIBRARIES = ("datasets", "peft", "transformers.models.llama.modeling_llama", "llama_lora.backends.native.backend")


def serve(has_work: Callable[[Sequence[str]], bool]) -> list[str]:
    """Fork for each request on standard input, until it is closed. Returns in the forks, with a stage's arguments.

    The libraries are imported before the first fork whose arguments have work: a stage that is skipped needs none.
    """
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    environment = dict(os.environ)
    requests = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    imported = False
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, MOST_BYTES, 2)
        if not message:
            os._exit(0)
        request, (output, answer) = json.loads(message), descriptors
        program, *arguments = request["arguments"]
        write_output_to(output)
        os.close(output)
        os.environ.clear()
        os.environ.update(environment | request["environment"])
        if not imported and has_work(arguments):
            imported = True
            import_libraries()
        safe = not has_threads()
        if fork_orphan():
            requests.close()
            atexit._clear()  # what is registered is the server's, such as the end of its temporary folders
            os.setsid()
            os.chdir(request["folder"])
            os.write(answer, str(os.getpid()).encode())
            os.close(answer)
            status = supervise(request["parent"], request["grace"])
            if status is not None:
                os._exit(status)
            if not safe:
                execute([program, *arguments])
            return arguments
        os.close(answer)
        write_output_to(null)


def write_output_to(descriptor: int) -> None:
    """Write what is printed from now on there."""
    for number, stream in enumerate((sys.stdout, sys.stderr), start=1):
        stream.flush()
        os.dup2(descriptor, number)


def import_libraries() -> None:
    """Import what stages import. An error is left to the stage."""
    for name in LIBRARIES:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.freeze()  # a collection in a fork would write to, and so copy, the pages of all objects


def run_to_exit(command: Callable[[], object]) -> NoReturn:
    """Run a command in a fork, and exit as Python does: the status of its SystemExit, its own functions of atexit.

    The interpreter does not free its objects first: in a fork that copies nearly every page of the server, which takes
    3 s of CPU time once the libraries are imported.
    """
    status = 1
    try:
        command()
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):  # of a library; what the stage wrote is complete
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the reader has exited, or the stream is closed
            stream.flush()
    os._exit(status)


def fork_orphan() -> bool:
    """Fork, and end the fork's parent, so that genvalues adopts the fork. Returns whether this is the fork."""
    if child := os.fork():
        os.waitpid(child, 0)
        return False
    parent = os.getpid()
    if os.fork():
        os._exit(0)
    while os.getppid() == parent:
        time.sleep(0.001)
    return True


def has_threads() -> bool:
    """Whether a library has started a thread: it is not in a fork, which may wait for it forever.

    That of pyarrow's allocator may be missing.
    """
    names = [(thread / "comm").read_text() for thread in Path("/proc/self/task").iterdir()]
    return len(names) - names.count("jemalloc_bg_thd\n") > 1
