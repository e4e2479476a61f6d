from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llama_lora.backends.xla import cache
from llama_lora.backends.xla.backend import XlaBackend
from trainer.conftest import Run
from trainer.xla.neuron_run import NeuronRun


@pytest.fixture
def neuron(new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Callable[..., NeuronRun]:
    monkeypatch.setattr(XlaBackend, "check", lambda self, config, model: None)
    monkeypatch.setattr(cache, "HEARTBEAT", 0.2)
    monkeypatch.setattr(cache, "TIMEOUT", 2.0)

    def make(name: str = "run", **changes: Any) -> NeuronRun:
        run = new_run(name, **changes)
        run.config["backend"] = "neuron"
        return NeuronRun(run)

    return make
