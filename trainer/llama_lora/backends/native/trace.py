"""Trace one training step of a run on a device that does not exist: its memory, operators and graphs.

    python -m llama_lora.backends.native.trace --config run.yaml [--model CONFIG.json]

No accelerator, no weights and little memory are needed. The last line on stdout is one JSON object:

- ``world``: the number of workers
- ``bytes``: the most that any worker holds. base, adapter, optimizer: parameters and AdamW's state; gradients: between
  micro-batches or before the update; gathered: parameters that FSDP has gathered in the backward pass; activations:
  what the forward pass keeps, with the batch; loss: what the loss takes beyond that, for a moment; peak: all at once.
  At the start of a micro-batch FSDP holds the root's parameters twice, which only peak contains.
- ``operators``: what the device is asked for
- ``graphs``: how many graphs torch.compile makes; 0 with compile.mode off
- ``seconds``: how long the trace took
- ``problems``: operators whose shape depends on data or is unknown, and tensors on another device; one line each

Exit status: 0 with the JSON object, also if there are problems; 2 if the user must change something.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from genvalues.common.errors import UserError, user_errors_end_with_status_2
from llama_lora import config as run_config
from llama_lora import environment as environment  # sets the variables that torch reads at import

if TYPE_CHECKING:
    from llama_lora.backends.base import TrainingJob
    from llama_lora.backends.native.traced import TracedEngine

# Layers are equal, so two small models say what each further layer adds. With three, one layer is neither the first nor
# the last.
LAYERS = 3
TERMS = ("base", "adapter", "gradients", "optimizer", "gathered", "activations", "loss", "peak")


@dataclasses.dataclass
class Trace:
    """See the module's text."""

    world: int
    bytes: dict[str, int]
    operators: list[str]
    graphs: int
    seconds: float
    problems: list[str]


def trace(config: run_config.RunConfig, model: Any, all_layers: bool = False) -> Trace:
    """Trace a run with a model of this transformers config. ``all_layers`` extrapolates nothing, for tests."""
    started = time.monotonic()
    job = training_job(config)
    world = config.parallelism.data_parallel_size * config.parallelism.tensor_parallel_size
    tracing = Tracing(job, model, world)
    graphs = tracing.graphs() if config.compile.mode == "layers" else 0
    found = tracing.worker_bytes(0, all_layers)
    if tracing.uneven:  # FSDP gives the last workers less, or nothing, of each parameter
        last = tracing.worker_bytes(world - 1, all_layers)
        found = {term: max(found[term], last[term]) for term in TERMS}
    seconds = round(time.monotonic() - started, 1)
    return Trace(world, found, sorted(tracing.operators), graphs, seconds, tracing.problems)


class Tracing:
    """Traces of one run, and what they have found."""

    def __init__(self, job: TrainingJob, model: Any, world: int) -> None:
        self.job, self.model, self.world = job, model, world
        self.operators: set[str] = set()
        self.problems: list[str] = []
        self.uneven = False

    def worker_bytes(self, rank: int, all_layers: bool) -> dict[str, int]:
        """The bytes of a worker by ``TERMS``; what a problem keeps from being measured is 0."""
        layers: int = self.model.num_hidden_layers
        kinds = getattr(self.model, "layer_types", None) or []
        if all_layers or layers <= LAYERS + 1 or len(set(kinds)) > 1:
            engine = self.engine(rank, layers)
            return sizes(engine, engine, layers, layers)
        return sizes(self.engine(rank, LAYERS), self.engine(rank, LAYERS + 1), LAYERS, layers)

    def engine(self, rank: int, layers: int, compile_backend: str | None = None) -> TracedEngine | None:
        """Run a step of a worker of a model with so many layers. None if it cannot run to its end."""
        from llama_lora.backends.native import fake_device
        from llama_lora.backends.native.traced import TracedEngine, problem

        try:
            with fake_device.opened(self.world, rank) as mode:
                engine = TracedEngine(self.job, with_layers(self.model, layers), mode, compile_backend)
                engine.trace_step()
        except Exception as error:
            self.add_problems([problem(error)])
            return None
        self.uneven = self.uneven or engine.uneven
        self.operators |= engine.monitor.operators
        self.add_problems(engine.problems())
        return engine

    def add_problems(self, found: list[str]) -> None:
        """Add what other traces have not found."""
        self.problems += [problem for problem in found if problem not in self.problems]

    def graphs(self) -> int:
        """The graphs of a run: further layers share those of the second.

        Call it before other traces: with tensor parallelism the first layer of a process can have a graph of its own,
        because PyTorch keeps the mesh of the first DTensor of each kind and a graph depends on which object that is.
        """
        from torch._dynamo.utils import counters

        counters.clear()
        self.engine(0, min(2, self.model.num_hidden_layers), compile_backend="aot_eager")
        return int(counters["stats"]["unique_graphs"])


def sizes(few: TracedEngine | None, more: TracedEngine | None, few_layers: int, layers: int) -> dict[str, int]:
    """The bytes for ``layers`` from traces of ``few_layers`` and of one more (or twice the trace of all)."""
    if few is None or more is None:
        return dict.fromkeys(TERMS, 0)

    def at(one: int, other: int) -> int:
        return one + (layers - few_layers) * (other - one)

    found = {name: at(size, more.sizes[name]) for name, size in few.sizes.items()}
    phases = [(few.phases[key], more.phases[other]) for key, other in few.matching_phases(more)]
    found["peak"] = max(at(a.peak, b.peak) for a, b in phases)
    backward = [(a, b) for a, b in phases if "backward" in a.what]
    found["gathered"] = max(at(a.peak_gathered, b.peak_gathered) for a, b in backward)
    loss = [(a, b) for a, b in phases if a.what.startswith("loss")]
    found["loss"] = max(at(a.peak_other - a.start.other, b.peak_other - b.start.other) for a, b in loss)
    return {term: found[term] for term in TERMS}


def with_layers(model: Any, layers: int) -> Any:
    """A copy of a transformers config with so many layers."""
    changed: dict[str, Any] = {**model.to_dict(), "num_hidden_layers": layers}
    if changed.get("layer_types"):
        changed["layer_types"] = changed["layer_types"][:layers]
    return type(model).from_dict(changed)


def training_job(config: run_config.RunConfig) -> TrainingJob:
    """The job of a worker, without files."""
    from llama_lora.backends.base import TrainingJob
    from llama_lora.paths import Paths

    nowhere = Path(os.devnull)
    return TrainingJob(
        model=nowhere,
        base_name=None,
        dataset=nowhere,
        lora=config.lora,
        training=config.training,
        parallelism=config.parallelism,
        compile=config.compile,
        device="neuron",
        probe=config.probe,
        fingerprint="",
        paths=Paths(nowhere, config.name),
    )


def read_model(config: run_config.RunConfig, file: Path | None) -> Any:
    """Read a model's config.json: of ``file``, or of the run's model. Raises UserError if it cannot be read."""
    from transformers import AutoConfig

    source, revision = str(file or config.model.path or config.model.id), config.model.revision or None
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot be read: {reason}", where=source, fix="Pass --model CONFIG.json.") from None


@click.command(help=(__doc__ or "").split("\n")[0])
@click.option("--config", "config_file", type=click.Path(path_type=Path), required=True, help="The run config.")
@click.option("--model", "model_file", type=click.Path(path_type=Path), help="The model's config.json.")
@user_errors_end_with_status_2
def main(config_file: Path, model_file: Path | None) -> None:
    hide_torch_neuronx()
    config = run_config.load(config_file)
    found = trace(config, read_model(config, model_file))
    click.echo(json.dumps(dataclasses.asdict(found)))


def hide_torch_neuronx() -> None:
    """Make TorchNeuron unavailable to this process: its device has the name of the traced one."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # read by the import of torch
    sys.modules["torch_neuronx"] = None  # type: ignore[assignment]


if __name__ == "__main__":
    main()
