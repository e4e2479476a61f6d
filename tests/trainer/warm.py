"""Forks with torch and transformers imported. torchrun forks its workers from a forked launcher in the same way.

The demo's tests start the installed commands.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from forked import ForkedPopen


class WarmPopen(ForkedPopen):
    """A ``ForkedPopen`` of a process that has imported what workers import."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        warm_up()
        super().__init__(*arguments, **options)


@functools.cache
def warm_up() -> None:
    """Import what workers import, and have torchrun fork its workers."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import llama_lora.backends.native.backend
    import llama_lora.stages.compile
    import llama_lora.stages.train  # noqa: F401

    def popen(handler: Any, args: Sequence[str], env: dict[str, str]) -> WarmPopen:
        return WarmPopen(args, env=env, stdout=handler._stdout, stderr=handler._stderr, start_new_session=True)

    SubprocessHandler._popen = popen
