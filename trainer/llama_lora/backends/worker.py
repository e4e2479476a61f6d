"""A worker of a distributed stage, as torchrun runs it: python -m llama_lora.backends.worker STAGE CONFIG WORKSPACE"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from genvalues.common.log import configure
from llama_lora import backends, environment  # environment sets the variables that torch reads at import
from llama_lora import config as run_config
from llama_lora.backends import failures, launch, stopping
from llama_lora.backends.base import Backend
from llama_lora.paths import Paths
from llama_lora.stage import Stage, declaration, lock_run

log = logging.getLogger("llama_lora.backends.worker")  # __name__ is __main__ here

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(stage_name: str, config_file: str, workspace: str) -> None:
    """Run the worker function of a stage."""
    work = declaration(stage_name).worker
    assert work is not None, f"{stage_name} has no workers"
    run(stage_name, config_file, workspace, work)


def run(stage_name: str, config_file: str, workspace: str, work: Callable[[Stage, Backend], None]) -> None:
    """Run ``work``. The launcher reads from a file why it failed, and reports one failure of all workers."""
    configure(environment.verbosity())
    die_with_launcher()
    try:
        config = run_config.load(Path(config_file))
        stage = Stage(stage_name, config, Paths(Path(workspace), config.name))
        backend = backends.get(config.backend)
        with stack_traces(stage), backend.using_cache(stage), lock_of_first(stage):
            work(stage, backend)
    except stopping.TrainingStopped as stopped:
        if os.environ["RANK"] == "0":
            log.info(f"{stage_name}: {stopped}")
        os._exit(stopping.EXIT_STOPPED)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        failure = failures.failure_of(error, Path(workspace), int(os.environ["RANK"]))
        failures.record(failure, Path(os.environ[launch.MESSAGES]))
        failures.end_worker(failure)


def stack_traces(stage: Stage) -> contextlib.AbstractContextManager[None]:
    """Write this worker's stack traces to its file on a stop signal. Rank 0 deletes files of workers beyond the size
    of the group."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank == 0:
        current = {stage.paths.worker_stacks(stage.name, number) for number in range(size)}
        for file in set(stage.paths.stacks.glob(f"{stage.name}-rank-*.txt")) - current:
            file.unlink(missing_ok=True)
    return stopping.write_stacks_to(stage.paths.worker_stacks(stage.name, rank))


def lock_of_first(stage: Stage) -> contextlib.AbstractContextManager[None]:
    """Hold the run's lock in the worker of rank 0. The others wait for it in their first collective."""
    return lock_run(stage) if os.environ["RANK"] == "0" else contextlib.nullcontext()


def die_with_launcher() -> None:
    """End this worker when its launcher is killed, so that it does not keep writing to the run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ[launch.LAUNCHER]):  # it has ended already
            sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
