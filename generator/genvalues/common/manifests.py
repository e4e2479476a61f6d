"""A stage's manifest (runs/NAME/stages/STAGE.json) as one line of a log.

The manifest is on the volume, which cannot be read outside the cluster; logs can. So each stage, and each gate, whose
stage's pods may be deleted with their nodes, ends its log with this line, and `genvalues bundle` reads it from the log.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genvalues.common.json_files import InvalidJson, read_object

# The kubelet splits log lines at 16 KiB (containerd, CRI-O), and people read past it.
LINE_LENGTH = 6000
FACT_LENGTH = 1000  # of a fact's JSON; those of an evaluation may be long
OUTPUTS = 20  # that are named; the number and bytes include the others
SKIPPED = "nothing changed, skipped"  # what a stage, or its gate, logs when its outputs are up to date
LINE = re.compile(r"^(?:\S+ )?(?P<stage>[a-z][a-z-]{0,40}): manifest (?P<json>\{.*\})\s*$", re.MULTILINE)


def line_of(file: Path) -> str:
    """The line for the manifest; empty if it cannot be read. Never raises, because the line is for information only."""
    try:
        manifest = read_object(file)
        line = f"{manifest['stage']}: manifest {compact(manifest)}"
    except (InvalidJson, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    return line if LINE.fullmatch(line) else ""


def compact(manifest: Mapping[str, Any]) -> str:
    """The manifest as JSON of at most LINE_LENGTH: without the outputs' digests and without long facts."""
    outputs = {name: output["bytes"] for name, output in manifest["outputs"].items()}
    whole = {
        **{key: manifest[key] for key in ("stage", "fingerprint", "started", "finished", "versions")},
        "facts": {name: bounded(fact) for name, fact in manifest["facts"].items()},
        "files": len(outputs),
        "bytes": sum(outputs.values()),
        "outputs": dict(list(outputs.items())[:OUTPUTS]),
    }
    for omitted in ((), ("outputs",), ("outputs", "facts"), ("outputs", "facts", "versions")):
        text = as_json({key: value for key, value in whole.items() if key not in omitted})
        if len(text) <= LINE_LENGTH:
            return text
    raise ValueError("not a manifest: its names and times are too long")


def bounded(fact: Any) -> Any:
    length = len(as_json(fact))
    return fact if length <= FACT_LENGTH else f"(omitted: {length} characters)"


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def manifests_in(log: str) -> dict[str, dict[str, Any]]:
    """The manifests in a log by stage, the last one of each. Lines may start with a time stamp."""
    found = {}
    for line in LINE.finditer(log):
        try:
            manifest = json.loads(line["json"])
        except (ValueError, RecursionError):  # truncated, or another kind of line
            continue
        if manifest.get("stage") == line["stage"]:
            found[line["stage"]] = manifest
    return found
