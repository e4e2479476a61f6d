"""What a stage's manifest (runs/NAME/stages/STAGE.json) says, as one line of a log.

The manifest lies on the volume, which nobody outside the cluster reads; logs they do. So each stage, and the gate of
one whose pods go with their nodes, ends its log with this line, and `genvalues bundle` takes it out of the log again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The kubelet splits a log's line at 16 KiB (containerd, CRI-O), and people scroll past it.
LINE_LENGTH = 6000
FACT_LENGTH = 1000  # a fact's JSON; an evaluation's may be long
OUTPUTS = 20  # that are named; of the rest the number and the bytes are told
SKIPPED = "nothing changed, skipped"  # what a stage, or its gate, logs when its outputs are up to date
LINE = re.compile(r"^(?:\S+ )?(?P<stage>[a-z][a-z-]{0,40}): manifest (?P<json>\{.*\})\s*$", re.MULTILINE)


def line_of(file: Path) -> str:
    """The line that tells of the manifest; nothing where there is none. Never raises: it is for the record alone."""
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        return f"{manifest['stage']}: manifest {compact(manifest)}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""


def compact(manifest: Mapping[str, Any]) -> str:
    """Its JSON, of at most LINE_LENGTH: without the outputs' digests, and without what is long."""
    outputs = {name: output["bytes"] for name, output in manifest["outputs"].items()}
    whole = {
        **{key: manifest[key] for key in ("stage", "fingerprint", "started", "finished", "versions")},
        "facts": {name: bounded(fact) for name, fact in manifest["facts"].items()},
        "files": len(outputs),
        "bytes": sum(outputs.values()),
        "outputs": dict(list(outputs.items())[:OUTPUTS]),
    }
    for left_out in ((), ("outputs",), ("outputs", "facts"), ("outputs", "facts", "versions")):
        text = as_json({key: value for key, value in whole.items() if key not in left_out})
        if len(text) <= LINE_LENGTH:
            return text
    raise ValueError("a manifest whose names and times are long is none")


def bounded(fact: Any) -> Any:
    length = len(as_json(fact))
    return fact if length <= FACT_LENGTH else f"(left out: {length} characters)"


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def manifests_in(log: str) -> dict[str, dict[str, Any]]:
    """By stage: what a log tells of manifests, of each stage the last. With or without times in front of its lines."""
    found = {}
    for line in LINE.finditer(log):
        try:
            manifest = json.loads(line["json"])
        except (ValueError, RecursionError):  # cut, or a line of another kind
            continue
        if manifest.get("stage") == line["stage"]:
            found[line["stage"]] = manifest
    return found
