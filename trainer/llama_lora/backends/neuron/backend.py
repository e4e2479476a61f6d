"""The Neuron backend: optimum-neuron's model and NeuronX Distributed's optimizer in the project's training loop."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from genvalues.common.errors import UserError, UserErrors
from llama_lora.backends import checkpoints
from llama_lora.backends.base import Adapter, TrainingJob, TrainingResult
from llama_lora.backends.neuron import provenance, rules, shards
from llama_lora.config import RunConfig

log = logging.getLogger(__name__)


class NeuronBackend:
    """See ``base.Backend``. Only ``train`` needs the Neuron libraries."""

    def check(self, config: RunConfig, model: Path) -> None:
        """Check the settings against the rules of optimum-neuron and of tensor parallelism."""
        model_config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        mistakes = rules.check(config, model_config, provenance.platform() or None)
        if mistakes:
            raise UserErrors(mistakes)
        for warning in rules.warnings(config):
            log.warning(warning)

    def train(self, job: TrainingJob, finish: Callable[[TrainingResult], None]) -> None:
        from llama_lora.backends import loop

        try:
            from llama_lora.backends.neuron.training import NeuronEngine
        except ModuleNotFoundError as missing:
            raise UserError(
                f"{missing.name} is not installed; backend neuron needs it",
                where="image",
                fix="Use an image of `genvalues image build`: its base image has the Neuron libraries.",
            ) from None

        engine = NeuronEngine(job)
        loop.run_training(job, engine, engine.workers, finish)

    def read_adapter(self, checkpoint: Path, base: Path | None) -> Adapter:
        if (checkpoint / checkpoints.RECORD).is_file():  # optimum-neuron's own trainer writes none
            checkpoints.verify_checkpoint(checkpoint)
        adapter = shards.read_adapter(checkpoint)
        config = base / "config.json" if base else checkpoint / shards.BASE_CONFIG
        if config.is_file():
            shards.check_shapes(adapter, json.loads(config.read_text(encoding="utf-8")), str(checkpoint))
        return adapter
