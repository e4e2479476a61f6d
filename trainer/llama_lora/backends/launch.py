"""Run the workers of this node under torchrun, and translate how they end.

torchrun exits with 1 for any worker failure. Here a worker's status 2 (the user must change something) stays 2, and 75
(the volume is full or fails) stays 75. The failure that caused the others is reported in one line.

Run as a program (python -m llama_lora.backends.launch STAGE CONFIG WORKSPACE), it does the same for a caller that does
not pass on exit statuses (neuron_parallel_compile): the process that sets LLAMA_LORA_MESSAGES reads the failures there.
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

from genvalues.common.errors import UserError, VolumeError
from genvalues.common.log import configure
from genvalues.common.process import noted_signals, processes
from genvalues.common.text import one_line
from llama_lora import config as run_config
from llama_lora import environment
from llama_lora.backends import failures, stopping
from llama_lora.config import RunConfig
from llama_lora.paths import Paths

log = logging.getLogger("llama_lora.backends.launch")  # __name__ can be __main__

LAUNCHER = "LLAMA_LORA_LAUNCHER"  # the launcher's process id, for its workers
MESSAGES = "LLAMA_LORA_MESSAGES"  # the folder for what the workers record of their failures
POLL_INTERVAL = 0.2  # seconds
WAIT_WITHOUT_WORKERS = 3.0  # seconds from the end of the workers to the end of a node that is asked to stop


def worker_command(stage: str, paths: Paths) -> list[str]:
    """The command of one worker. It reads the config that the stage wrote to the run's folder."""
    return [sys.executable, "-m", "llama_lora.backends.worker", stage, str(paths.config), str(paths.workspace)]


def launcher_command(stage: str, paths: Paths) -> list[str]:
    """The command that runs this node's workers, for another program to call."""
    return [sys.executable, "-m", "llama_lora.backends.launch", stage, str(paths.config), str(paths.workspace)]


def run_workers(command: Sequence[str], config: RunConfig) -> None:
    """Run ``command`` in every worker of this node and wait for them.

    The rendezvous comes from torchrun's PET_* variables: the training operator sets PET_RDZV_ENDPOINT, Kubeflow Trainer
    PET_MASTER_ADDR and PET_MASTER_PORT. Without them this machine runs alone, with parallelism.processesPerNode
    workers.

    Raises UserErrors or VolumeError if a worker did, and WorkersFailed if one failed otherwise. Ends this process with
    status 143 if the workers saved and stopped on request, and with 128 + N after another signal N.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, get_args_parser

    os.environ.setdefault("PET_NPROC_PER_NODE", str(config.parallelism.processes_per_node))
    arguments = get_args_parser().parse_args(["--no-python", *command])
    if "PET_RDZV_ENDPOINT" not in os.environ:
        arguments.rdzv_backend = "c10d"  # also with Kubeflow Trainer: a node that is lost can come back
        if master := os.environ.get("PET_MASTER_ADDR"):
            arguments.rdzv_endpoint = f"{master}:{os.environ.get('PET_MASTER_PORT', '29500')}"
        else:
            arguments.rdzv_endpoint = "localhost:0"
            arguments.local_addr = arguments.local_addr or "localhost"
    launch_config, entrypoint, entrypoint_arguments = config_from_args(arguments)
    environment.share_threads(launch_config.nproc_per_node)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # workers report their own errors
    with messages_folder() as messages:
        os.environ[LAUNCHER] = str(os.getpid())
        torchrun = Torchrun(lambda: elastic_launch(launch_config, entrypoint)(*entrypoint_arguments))
        status = wait_or_stop(torchrun)
        recorded = failures.read(messages)
        failures.raise_user_and_volume_errors(recorded)
        if status:  # whatever error torchrun ended with: it may not find a worker that the signal ended
            sys.exit(status)
        if isinstance(torchrun.error, ChildFailedError):
            statuses = {rank: failed.exitcode for rank, failed in torchrun.error.failures.items()}
            if set(statuses.values()) == {stopping.EXIT_STOPPED}:
                sys.exit(stopping.EXIT_STOPPED)
            raise failures.cause(recorded, statuses)
        if isinstance(torchrun.error, RendezvousError):
            raise failures.WorkersFailed(f"the nodes did not meet: {one_line(str(torchrun.error), 200)}")
        if torchrun.error:
            raise torchrun.error


class Torchrun(threading.Thread):
    """torchrun's agent in a thread, where it does not replace this process's signal handlers (torch 2.8,
    PContext.start)."""

    def __init__(self, launch: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.error: BaseException | None = None
        self._launch = launch

    def run(self) -> None:
        try:
            self._launch()
        except BaseException as error:  # run_workers raises it
            self.error = error


def wait_or_stop(torchrun: Torchrun) -> int:
    """Wait for the workers to end. Returns 0, or 128 + N if signal N ended them.

    After SIGTERM the workers have time to save; then they are killed. Other signals kill them at once.
    """
    kill_at = None
    gone_since = None
    with noted_signals() as (noted, wake_up):
        torchrun.start()
        while torchrun.is_alive():
            if select.select([wake_up], [], [], POLL_INTERVAL)[0]:
                os.read(wake_up, 1024)
            if not noted:
                continue
            workers = [pid for pid, parent in processes() if parent == os.getpid()]
            if kill_at is None:
                saves = noted[0] == signal.SIGTERM
                time_to_save = stopping.grace_period() - stopping.MARGIN if saves else 0.0
                kill_at = time.monotonic() + time_to_save
                if saves:
                    log.info(f"stopping: workers are saving, within {time_to_save:.0f} s")
                    send_signal(workers, stopping.STOP_SIGNAL)
            if time.monotonic() >= kill_at:
                send_signal(workers, signal.SIGKILL)
            gone_since = None if workers else gone_since or time.monotonic()
            if gone_since and time.monotonic() - gone_since > WAIT_WITHOUT_WORKERS:
                break  # the agent is waiting for other nodes
    return 128 + noted[0] if noted and (torchrun.is_alive() or torchrun.error) else 0


def send_signal(workers: Sequence[int], number: int) -> None:
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@contextmanager
def messages_folder() -> Iterator[Path]:
    """The folder for the failures of the workers: the caller's if it set one, else a temporary one."""
    if MESSAGES in os.environ:
        yield Path(os.environ[MESSAGES])
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ[MESSAGES] = folder
        try:
            yield Path(folder)
        finally:
            del os.environ[MESSAGES]


def main(stage: str, config_file: str, workspace: str) -> None:
    """Run this node's workers of a stage. The caller reads their failures."""
    configure(environment.verbosity())
    config = run_config.load(Path(config_file))
    try:
        run_workers(worker_command(stage, Paths(Path(workspace), config.name)), config)
    except (UserError, VolumeError) as error:
        sys.exit(error.status)
    except failures.WorkersFailed as error:
        print(error, file=sys.stderr)
        sys.exit(error.status)


if __name__ == "__main__":
    main(*sys.argv[1:])
