"""Backend xla: optimum-neuron's model and NeuronX Distributed's optimizer in the project's training loop."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from genvalues.common.errors import UserError, UserErrors
from llama_lora.backends import checkpoints
from llama_lora.backends.base import Adapter, TrainingJob, TrainingResult
from llama_lora.backends.xla import cache, compiling, provenance, rules, shards
from llama_lora.config import RunConfig
from llama_lora.stage import Stage

log = logging.getLogger(__name__)


class XlaBackend:
    """See ``base.Backend``. Only ``train`` needs the Neuron libraries."""

    dry_run_steps = 10  # AWS recommends "about 10": they cover every graph of a run

    def check(self, config: RunConfig, model: Path) -> None:
        """Check the settings against the rules of optimum-neuron and of tensor parallelism."""
        model_config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        mistakes = rules.check(config, model_config, provenance.platform() or None)
        if mistakes:
            raise UserErrors(mistakes)
        for warning in rules.warnings(config):
            log.warning(warning)

    def compile(self, stage: Stage) -> None:
        compiling.compile_graphs(stage)

    def finish_dry_run(self, stage: Stage, result: TrainingResult) -> None:
        compiling.record_trial_end(stage)  # devices return zeros in it, so its results are not real

    def check_compiled(self, stage: Stage) -> None:
        provenance.check_provenance(stage)

    def using_cache(self, stage: Stage) -> AbstractContextManager[object]:
        """Register this worker as a user of the cache too."""
        cache.set_environment(stage.paths)
        return cache.using_cache_as_worker(stage.paths, stage.name)

    def train(self, job: TrainingJob, finish: Callable[[TrainingResult], None]) -> None:
        from llama_lora.backends import loop

        try:
            from llama_lora.backends.xla.training import XlaEngine
        except ModuleNotFoundError as missing:
            raise UserError(
                f"{missing.name} is not installed; backend xla needs it",
                where="image",
                fix="Use an image of `genvalues image build`: its base image has the Neuron libraries.",
            ) from None

        engine = XlaEngine(job)
        loop.run_training(job, engine, engine.workers, finish)

    def read_adapter(self, checkpoint: Path, base: Path | None) -> Adapter:
        if (checkpoint / checkpoints.RECORD).is_file():  # optimum-neuron's own trainer writes none
            checkpoints.verify_checkpoint(checkpoint)
        adapter = shards.read_adapter(checkpoint)
        config = base / "config.json" if base else checkpoint / shards.BASE_CONFIG
        if config.is_file():
            shards.check_shapes(adapter, shards.load_json(config), str(checkpoint))
        return adapter
