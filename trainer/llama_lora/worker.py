"""A worker of a distributed stage, as torchrun starts it: python -m llama_lora.worker STAGE CONFIG WORKSPACE."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

from genvalues.common import log
from genvalues.common.errors import EXIT_USER_ERROR, UserError
from llama_lora import backends, launch, stopping
from llama_lora import config as run_config
from llama_lora import environment as environment  # sets what torch reads when it is imported
from llama_lora.paths import Paths
from llama_lora.stage import Stage, declaration

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(stage_name: str, config_file: str, workspace: str) -> None:
    """Do what the stage has its workers do. A UserError is left for the launcher, which tells it once for all."""
    die_with_the_launcher()
    log.configure()
    try:
        config = run_config.load(Path(config_file))
        stage = Stage(stage_name, config, Paths(Path(workspace), config.name))
        work = declaration(stage_name).worker
        assert work is not None, f"{stage_name} has no workers"
        with stacks(stage), compile_cache(stage):
            work(stage, backends.get(config.backend))
    except UserError as error:
        Path(os.environ[launch.MESSAGES], os.environ["RANK"]).write_text(str(error), encoding="utf-8")
        sys.stdout.flush()
        os._exit(EXIT_USER_ERROR)  # an orderly exit aborts where gloo's threads still wait for the other workers
    except stopping.Stopped as stopped:
        if os.environ["RANK"] == "0":
            print(f"{stage_name}: {stopped}", flush=True)
        os._exit(stopping.STOPPED)


def stacks(stage: Stage) -> contextlib.AbstractContextManager[None]:
    """Where this worker's stacks go when it is told to stop; those of more workers than there are now, gone."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank == 0:
        own = {stage.paths.worker_stacks(stage.name, number) for number in range(size)}
        for file in set(stage.paths.stacks.glob(f"{stage.name}-rank-*.txt")) - own:
            file.unlink(missing_ok=True)
    return stopping.stacks_in(stage.paths.worker_stacks(stage.name, rank))


def compile_cache(stage: Stage) -> contextlib.AbstractContextManager[object]:
    """On Trainium the graph cache, the same for compile and train, and known to be in use."""
    if stage.config.backend != "neuron":
        return contextlib.nullcontext()
    from llama_lora.backends.neuron import cache

    cache.set_environment(stage.paths)
    return cache.used_by_worker(stage.paths, stage.name)


def die_with_the_launcher() -> None:
    """A launcher that is killed outright must not leave workers behind that write into the run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ[launch.LAUNCHER]):  # it is gone already
            sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
