"""What the graphs of a run depend on: recorded when they are compiled, and compared before a training starts.

A graph that is not in the cache is compiled while all Trainium nodes wait.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genvalues.common.dicts import flatten
from genvalues.common.errors import UserError
from llama_lora.stage import Stage

log = logging.getLogger(__name__)

OTHER_NODES = 30.0  # seconds within which all pods of a job start


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List each value that differs, as "lora.r: 16 -> 32"."""
    before, after = flatten(then), flatten(now)
    return [
        f"{name}: {show_value(before.get(name))} -> {show_value(after.get(name))}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def show_value(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)


def check_compiled(stage: Stage, now: Mapping[str, Any], cache: Path) -> None:
    """Check, before the workers of a training start, that the cached graphs are theirs.

    ``now`` is the provenance of graphs of this process. It is compared with the one that compile has recorded.

    Raises UserError with every value that differs; with compile.onMismatch: warn, logs a warning instead. Unless only
    the environment differs, deletes compile's manifest, so that the next `helm upgrade` compiles.
    """
    recorded = stage.upstream("compile").facts.get("provenance")
    compiled = recorded if isinstance(recorded, dict) else {}
    differing = differences(compiled, json.loads(json.dumps(now)))
    if not differing:
        return
    found = "the graphs were compiled for other settings (then -> now):\n  " + "\n  ".join(differing)
    if stage.config.compile.on_mismatch == "warn":
        log.warning(
            f"{found}\nMissing graphs are compiled while the training waits, which can take hours "
            "(compile.onMismatch: warn)."
        )
        return
    if all(line.startswith("environment.") for line in differing):
        fix = "Use the same environment for compile and train: set it in stageDefaults.extraEnv."
    else:
        if stage.config.parallelism.nodes > 1:
            time.sleep(OTHER_NODES)  # the other nodes must read the manifest first, to report the same error
        stage.paths.manifest("compile").unlink(missing_ok=True)
        fix = "Compile again: run `helm upgrade`, or `llama-lora compile --config ...`."
    raise UserError(f"{found}\n", where=str(cache), fix=fix)
