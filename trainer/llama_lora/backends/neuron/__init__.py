"""The Neuron backend: optimum-neuron's model and NeuronX Distributed's optimizer on Trainium, in the project's loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from genvalues.errors import UserErrors
from llama_lora.backends import Adapter, TrainingJob, TrainingResult
from llama_lora.backends.neuron import rules, shards
from llama_lora.config import RunConfig


class NeuronBackend:
    """See ``backends.Backend``. Only ``train`` needs the Neuron libraries."""

    def check(self, config: RunConfig, model: Path) -> None:
        """What optimum-neuron can train, and cut over so many cores."""
        mistakes = rules.check(config, json.loads((model / "config.json").read_text(encoding="utf-8")))
        if mistakes:
            raise UserErrors(mistakes)
        for doubt in rules.warnings(config):
            print(f"warning: {doubt}", flush=True)

    def compile_command(self, command: Sequence[str]) -> list[str]:
        return list(command)

    def train(self, job: TrainingJob, finish: Callable[[TrainingResult], None]) -> None:
        from llama_lora.backends import loop
        from llama_lora.backends.neuron.training import NeuronEngine

        engine = NeuronEngine(job)
        loop.train(job, engine, engine.workers, finish)

    def read_adapter(self, checkpoint: Path, base: Path | None) -> Adapter:
        adapter = shards.read_adapter(checkpoint)
        config = base / "config.json" if base else checkpoint / shards.BASE_CONFIG
        if config.is_file():
            shards.check_shapes(adapter, json.loads(config.read_text(encoding="utf-8")), str(checkpoint))
        return adapter
