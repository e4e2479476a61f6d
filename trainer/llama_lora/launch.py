"""Start the workers of this node under torchrun, and tell how they ended.

torchrun exits with 1 whatever its workers return; here a worker's status 2 (the user must change something) stays 2,
and its message is told once, not by every worker.

Run as a program, python -m llama_lora.launch STAGE CONFIG WORKSPACE, it does that for another program that passes no
exit status on (neuron_parallel_compile): who set LLAMA_LORA_MESSAGES reads the messages there.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from genvalues.common.errors import EXIT_USER_ERROR, UserError, UserErrors
from genvalues.common.process import noted_signals, processes
from llama_lora import config as run_config
from llama_lora import environment, stopping
from llama_lora.config import RunConfig
from llama_lora.paths import Paths

LAUNCHER = "LLAMA_LORA_LAUNCHER"  # tells a worker the process id of its launcher
LOOK = 0.2  # seconds between two looks at the workers
PATIENCE_WITHOUT_WORKERS = 3.0  # of a node that is told to stop
MESSAGES = "LLAMA_LORA_MESSAGES"  # and the folder for the message of a UserError


def worker_command(stage: str, paths: Paths) -> list[str]:
    """The command of one worker. It reads the config the stage has written into the run's folder."""
    return [sys.executable, "-m", "llama_lora.worker", stage, str(paths.config), str(paths.workspace)]


def launcher_command(stage: str, paths: Paths) -> list[str]:
    """The command that starts this node's workers, for a program that runs it."""
    return [sys.executable, "-m", "llama_lora.launch", stage, str(paths.config), str(paths.workspace)]


def run_workers(command: Sequence[str], config: RunConfig) -> None:
    """Run ``command`` in every worker of this node and wait for them.

    Rendezvous comes from torchrun's own PET_* variables, which the training operator sets; without them: this machine
    alone, with parallelism.processesPerNode workers. Raises UserErrors where a worker ended with status 2; ends this
    process with status 143 where they have saved and stopped, because this node or another was told to; with 1 where
    one ended otherwise; and as a signal asks.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, get_args_parser

    os.environ.setdefault("PET_NPROC_PER_NODE", str(config.parallelism.processes_per_node))
    arguments = get_args_parser().parse_args(["--no-python", *command])
    if "PET_RDZV_ENDPOINT" not in os.environ:
        arguments.rdzv_backend, arguments.rdzv_endpoint = "c10d", "localhost:0"
        arguments.local_addr = arguments.local_addr or "localhost"
    launch_config, entrypoint, entrypoint_arguments = config_from_args(arguments)
    environment.share_threads(launch_config.nproc_per_node)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a worker says itself why it ends
    with messages_folder() as messages:
        os.environ[LAUNCHER] = str(os.getpid())
        torchrun = Torchrun(lambda: elastic_launch(launch_config, entrypoint)(*entrypoint_arguments))
        status = wait_or_stop(torchrun)
        if told := messages_in(messages):
            raise UserErrors(told)
        if isinstance(torchrun.error, ChildFailedError):
            ends = {failure.exitcode for failure in torchrun.error.failures.values()}
            sys.exit(status or (stopping.STOPPED if ends == {stopping.STOPPED} else 1))
        if torchrun.error:
            raise torchrun.error
        if status:
            sys.exit(status)


class Torchrun(threading.Thread):
    """torchrun's agent, in a thread, where it leaves this process's signals alone (torch 2.8, PContext.start)."""

    def __init__(self, launch: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.error: BaseException | None = None
        self._launch = launch

    def run(self) -> None:
        try:
            self._launch()
        except BaseException as error:  # raised again by who waits
            self.error = error


def wait_or_stop(torchrun: Torchrun) -> int:
    """Wait for the workers to end; 0, or 128 and a signal's number where that has ended them.

    After SIGTERM they have time to save; what has not ended then is killed. Other signals end them at once.
    """
    kill_at = None
    gone_since = None
    with noted_signals() as (noted, wake_up):
        torchrun.start()
        while torchrun.is_alive():
            if select.select([wake_up], [], [], LOOK)[0]:
                os.read(wake_up, 1024)
            if not noted:
                continue
            workers = [pid for pid, parent in processes() if parent == os.getpid()]
            if kill_at is None:
                saves = noted[0] == signal.SIGTERM
                patience = stopping.GRACE_PERIOD - stopping.MARGIN if saves else 0.0
                kill_at = time.monotonic() + patience
                if saves:
                    print(f"told to stop: the workers save and end, within {patience:.0f} s", flush=True)
                    send(workers, stopping.ASK)
            if time.monotonic() >= kill_at:
                send(workers, signal.SIGKILL)
            gone_since = None if workers else gone_since or time.monotonic()
            if gone_since and time.monotonic() - gone_since > PATIENCE_WITHOUT_WORKERS:
                break  # the agent waits for other nodes
    return 128 + noted[0] if noted and (torchrun.is_alive() or torchrun.error) else 0


def send(workers: Sequence[int], number: int) -> None:
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@contextmanager
def messages_folder() -> Iterator[Path]:
    """Where workers leave the messages of their UserErrors: a folder of whoever runs this launcher, else our own."""
    if MESSAGES in os.environ:
        yield Path(os.environ[MESSAGES])
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ[MESSAGES] = folder
        try:
            yield Path(folder)
        finally:
            del os.environ[MESSAGES]


def messages_in(folder: Path) -> list[UserError]:
    """What the workers have left there, each message once."""
    return [UserError(message) for message in sorted({file.read_text(encoding="utf-8") for file in folder.iterdir()})]


def main(stage: str, config_file: str, workspace: str) -> None:
    """Start this node's workers of a stage. The messages of their UserErrors are left for who reads them."""
    config = run_config.load(Path(config_file))
    try:
        run_workers(worker_command(stage, Paths(Path(workspace), config.name)), config)
    except UserError:
        sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    main(*sys.argv[1:])
