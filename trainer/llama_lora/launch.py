"""Start the workers of this node under torchrun, and tell how they ended.

torchrun exits with 1 whatever its workers return; here a worker's status 2 (the user must change something) stays 2.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from genvalues.errors import EXIT_USER_ERROR
from llama_lora.config import RunConfig
from llama_lora.paths import Paths


def worker_command(stage: str, paths: Paths) -> list[str]:
    """The command of one worker. It reads the config the stage has written into the run's folder."""
    return [sys.executable, "-m", "llama_lora.worker", stage, str(paths.config), str(paths.workspace)]


def run_workers(command: Sequence[str], config: RunConfig) -> None:
    """Run ``command`` in every worker of this node and wait; end this process with status 2 or 1 if one fails.

    Rendezvous comes from torchrun's own PET_* variables, which the training operator sets; without them: this machine
    alone, with parallelism.processesPerNode workers.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, get_args_parser

    os.environ.setdefault("PET_NPROC_PER_NODE", str(config.parallelism.processes_per_node))
    if "PET_RDZV_ENDPOINT" not in os.environ:
        os.environ["PET_STANDALONE"] = "1"
        os.environ.setdefault("PET_LOCAL_ADDR", "localhost")
    # The workers share this process's threads (see environment.py); torchrun's 1 a worker would leave cores idle.
    threads = int(os.environ["OMP_NUM_THREADS"]) // int(os.environ["PET_NPROC_PER_NODE"])
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a worker says itself why it ends
    arguments = get_args_parser().parse_args(["--no-python", *command])
    if arguments.standalone:
        arguments.rdzv_backend, arguments.rdzv_endpoint = "c10d", "localhost:0"
    launch_config, entrypoint, entrypoint_arguments = config_from_args(arguments)
    try:
        elastic_launch(launch_config, entrypoint)(*entrypoint_arguments)
    except ChildFailedError as error:
        statuses = {failure.exitcode for failure in error.failures.values()}
        sys.exit(EXIT_USER_ERROR if EXIT_USER_ERROR in statuses else 1)
    except SignalException as error:
        sys.exit(128 + int(error.sigval))
