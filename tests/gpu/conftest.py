"""The native engine on a GPU (make test-gpu). Skipped where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Ask the driver's management library for GPUs: CUDA itself could not be used in forks of this process afterwards.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = [item for item in items if Path(__file__).parent in item.path.parents]
    if own and not has_gpu():
        for item in own:
            item.add_marker(pytest.mark.skip("need a GPU: make test-gpu"))


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
