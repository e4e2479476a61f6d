"""A run of backend xla on a machine without Trainium: the compiler and the backend are stand-ins (standin/)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_lora import stage
from llama_lora.backends import launch
from llama_lora.backends.xla import cache
from llama_lora.paths import Paths
from trainer.conftest import LLAMA_LORA, Run, llama_lora_here
from trainer.warm import WarmPopen

STANDIN = Path(__file__).parent / "standin"
ALONE = {"NEURON_CC_FLAGS": "", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def launcher_of_one_worker(stage: str, paths: Paths) -> list[str]:
    """What stands in for torchrun, and is the launcher whose end a worker watches for."""
    return ["sh", "-c", f'{launch.LAUNCHER}=$$ "$@" & wait $!', "worker", *launch.worker_command(stage, paths)]


def unique() -> str:
    return str(time.time_ns())


class NeuronRun:
    """A run with backend neuron whose compiler and backend are the stand-ins."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.log = run.folder / "calls.jsonl"
        run("tokenize")

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "PATH": os.pathsep.join([str(STANDIN), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(STANDIN), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "STANDIN_LOG": str(self.log),
            **more,
        }

    def as_process(self, name: str = "compile", status: int = 0, **environment: str) -> str:
        """Run a stage in a process of its own, with workers that torchrun starts; its output."""
        process = self.start(name, **environment)
        said, _ = process.communicate()
        assert process.returncode == status and "Traceback" not in said, said
        return said

    def __call__(self, name: str = "compile", status: int = 0, **environment: str) -> str:
        """The same in this process, with one worker that no torchrun starts: seconds less."""
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in {**self.environment(**environment), **ALONE, "MASTER_PORT": unique()}.items():
                patch.setenv(variable, value)
            patch.setattr(launch, "launcher_command", launcher_of_one_worker)
            return llama_lora_here(*self.command(name)[1:], status=status)

    def start(self, name: str = "compile", torchrun: bool = True, **environment: str) -> subprocess.Popen[str]:
        """Start a stage in a process of its own, with workers that torchrun starts, or with one that it does not."""
        with pytest.MonkeyPatch.context() as patch:
            if not torchrun:
                patch.setattr(launch, "launcher_command", launcher_of_one_worker)
                environment |= {**ALONE, "MASTER_PORT": unique()}
            return WarmPopen(
                self.command(name),
                env={**os.environ, **self.environment(**environment)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def command(self, name: str) -> list[str]:
        return [LLAMA_LORA, name, "--config", str(self.run.write_config()), "--workspace", str(self.run.workspace)]

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    @property
    def commands(self) -> list[str]:
        return [call["command"] for call in self.calls]

    @property
    def modules(self) -> list[cache.Module]:
        return cache.modules(self.run.paths.compile_cache)

    @property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = self.run.manifest("compile")["facts"]
        return facts

    def stage(self, name: str) -> stage.Stage:
        return stage.Stage(name, self.run.load(), self.run.paths)

    def is_done(self, name: str = "compile") -> bool:
        return self.stage(name).is_done()


def recorded(run: NeuronRun, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what the manifest of compile says that the graphs are for."""
    manifest = run.run.manifest("compile")
    change(manifest["facts"]["provenance"])
    run.run.paths.manifest("compile").write_text(json.dumps(manifest))
