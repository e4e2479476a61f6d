"""Where a model's config.json is found: the committed table, a folder on this computer, the cache, the Hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from genvalues.accelerators.architectures import Architecture, from_config, known

MOST_BYTES = 1 << 20  # of a config.json; the largest have a few kilobytes


class Model(NamedTuple):
    """A model as far as it is known. ``unknown`` says why there is no architecture."""

    name: str
    architecture: Architecture | None
    source: str = ""
    unknown: str = ""


def at_path(path: str, here: bool) -> Model:
    """A folder of a snapshot, read where it is on this computer (``here``), or on the volume, which is not seen."""
    if not here:
        return Model(path, None, unknown="it is on the volume, which this computer does not see")
    config = Path(path) / "config.json"
    if path.endswith(".gguf") and Path(path).is_file():  # tokenize converts it
        return Model(path, None, unknown="the sizes in a GGUF file are not read")
    try:
        return _model(path, json.loads(config.read_text(encoding="utf-8")), str(config))
    except (OSError, ValueError, RecursionError) as error:
        return Model(path, None, unknown=f"{config} cannot be read ({type(error).__name__})")


def on_hub(model_id: str, revision: str, offline: bool) -> Model:
    """A model of the Hub, at a revision (empty: main). Only what is neither in the table nor in the cache is asked for.

    The table knows a model as its newest revision has it; sizes do not change between revisions.
    """
    if architecture := known(model_id):
        return Model(model_id, architecture, "the table of genvalues")
    revision = revision or "main"
    cached = cache_file(model_id, revision)
    try:
        return _model(model_id, json.loads(cached.read_text(encoding="utf-8")), f"config.json of the Hub, at {cached}")
    except (OSError, ValueError, RecursionError):
        pass
    if offline or is_offline(os.environ):
        return Model(model_id, None, unknown="it is not in genvalues' table, and the Hub is not asked (offline)")
    text, problem = fetch(model_id, revision)
    if text is None:
        return Model(model_id, None, unknown=f"it is not in genvalues' table, and the Hub {problem}")
    try:
        found = _model(model_id, json.loads(text), "config.json of the Hub")
    except (ValueError, RecursionError):
        return Model(model_id, None, unknown="its config.json on the Hub is not JSON")
    if found.architecture:
        _keep(cached, text)
    return found


def _model(name: str, config: Any, source: str) -> Model:
    architecture = from_config(config) if isinstance(config, dict) else None
    if architecture:
        return Model(name, architecture, source)
    kind = str(config.get("model_type", "unknown"))[:40] if isinstance(config, dict) else "unknown"
    return Model(name, None, source, unknown=f"its config.json (model_type {kind}) has not the sizes of a Llama")


def fetch(model_id: str, revision: str) -> tuple[str | None, str]:
    """(config.json, "") or (None, what the Hub did, as one says it)."""
    from urllib.parse import quote

    from genvalues.common import hub

    path = f"/{model_id}/resolve/{quote(revision, safe='')}/config.json"
    answer = hub.ask(hub.endpoint_of_environment(), path, hub.token_of_environment())
    if not answer.status:
        return None, f"cannot be reached ({answer.problem})"
    if answer.status != 200:
        return None, {
            401: "wants a token that may read it (HF_TOKEN, or `hf auth login`)",
            403: "says that this token has no access to it (accept the model's terms there)",
            404: "has no such model or revision",
        }.get(answer.status, f"answers {answer.status}")
    if len(answer.body) > MOST_BYTES:
        return None, "has a config.json of more than 1 MiB"
    try:
        return answer.body.decode("utf-8"), ""
    except UnicodeDecodeError:
        return None, "has a config.json that is not text"


def is_offline(environment: Mapping[str, str]) -> bool:
    """As huggingface_hub reads HF_HUB_OFFLINE."""
    return environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def cache_file(model_id: str, revision: str) -> Path:
    """Of a model's config.json: $XDG_CACHE_HOME/llama-lora/models/ID@REVISION.json."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # there is no home
        home = Path("/nonexistent")
    return home / "llama-lora" / "models" / f"{re.sub(r'[^A-Za-z0-9._-]', '--', f'{model_id}@{revision}')}.json"


def _keep(file: Path, text: str) -> None:
    """The cache is a convenience: where it cannot be written, the Hub is asked again next time."""
    from genvalues.common.files import write_text

    try:
        write_text(file, text)
    except OSError:
        return
