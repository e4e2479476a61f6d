"""No test of the generator asks the Hub: a model that nobody knows stays unknown (plan/models.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def no_hub() -> Iterator[None]:
    """For the generator's modules alone: the trainer's tests have a Hub of their own, in the same process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield
