"""Start the workers of this node under torchrun, and tell how they ended.

torchrun exits with 1 whatever its workers return; here a worker's status 2 (the user must change something) stays 2,
and its message is told once, not by every worker.

Run as a program, python -m llama_lora.launch STAGE CONFIG WORKSPACE, it does that for another program that passes no
exit status on (neuron_parallel_compile): who set LLAMA_LORA_MESSAGES reads the messages there.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from genvalues.errors import EXIT_USER_ERROR, UserError, UserErrors
from llama_lora import config as run_config
from llama_lora import environment
from llama_lora.config import RunConfig
from llama_lora.paths import Paths

LAUNCHER = "LLAMA_LORA_LAUNCHER"  # tells a worker the process id of its launcher
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
    process with status 1 where one ended otherwise, and as a signal asks.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
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
        try:
            elastic_launch(launch_config, entrypoint)(*entrypoint_arguments)
        except ChildFailedError:
            if told := messages_in(messages):
                raise UserErrors(told) from None
            sys.exit(1)
        except SignalException as error:
            sys.exit(128 + int(error.sigval))


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
