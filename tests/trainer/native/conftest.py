from __future__ import annotations

import importlib
from pathlib import Path

import peft  # noqa: F401  imported once, before the workers are forked
import pytest
import torch
import torch._dynamo
import torch.distributed.fsdp

from llama_lora.backends.native import model as native_model
from trainer.conftest import make_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # before the first fork: threads do not survive it
    for name in ("torch._dynamo.convert_frame", "torch._functorch.aot_autograd", "torch._inductor.compile_fx"):
        importlib.import_module(name)  # torch.compile imports them, for seconds in each fork


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the tests are short: with the real chunk the logits would be one chunk."""
    monkeypatch.setattr(native_model, "LOSS_CHUNK", 16)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("native") / "fp32", num_key_value_heads=4)


@pytest.fixture(scope="session")
def bf16_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("native") / "bf16", dtype="bfloat16", num_key_value_heads=4)
