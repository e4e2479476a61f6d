"""Where a model's config.json is found: the committed table, a local folder, the cache, the Hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from genvalues.accelerators.architectures import Architecture, UnknownArchitecture, from_config, known_config
from genvalues.common.files import refuse_fifo

MOST_BYTES = 1 << 20  # of a config.json; the largest have a few kilobytes


class ModelFacts(NamedTuple):
    """A model as far as it is known. ``unknown``: why there is no architecture."""

    name: str
    architecture: Architecture | None
    source: str = ""
    unknown: str = ""
    config: Mapping[str, Any] | None = None  # config.json, or the table's part of it


def at_path(path: str, here: bool) -> ModelFacts:
    """A snapshot's folder, on this computer (``here``) or on the volume, which cannot be read from here."""
    if not here:
        return ModelFacts(path, None, unknown="it is on the volume, which this computer cannot read")
    config = Path(path) / "config.json"
    if path.endswith(".gguf") and Path(path).is_file():  # tokenize converts it
        return ModelFacts(path, None, unknown="the sizes in a GGUF file are not read")
    try:
        refuse_fifo(config)
        return _model(path, json.loads(config.read_text(encoding="utf-8")), str(config))
    except (OSError, ValueError, RecursionError) as error:
        return ModelFacts(path, None, unknown=f"cannot read {config} ({type(error).__name__})")


def on_hub(model_id: str, revision: str, offline: bool) -> ModelFacts:
    """A model of the Hub at a revision (empty: main). The Hub is asked only for what table and cache do not have.

    The table has one entry per model: its sizes do not change between revisions.
    """
    if config := known_config(model_id):
        return ModelFacts(model_id, from_config(config), "built-in table", config=config)
    revision = revision or "main"
    cached = cache_file(model_id, revision)
    try:
        return _model(model_id, json.loads(cached.read_text(encoding="utf-8")), f"config.json of the Hub, in {cached}")
    except (OSError, ValueError, RecursionError):
        pass
    if offline or is_offline(os.environ):
        return ModelFacts(model_id, None, unknown="it is not in the built-in table, and the Hub is not used (offline)")
    text, problem = fetch(model_id, revision)
    if text is None:
        return ModelFacts(model_id, None, unknown=f"it is not in the built-in table, and the Hub {problem}")
    try:
        found = _model(model_id, json.loads(text), "config.json of the Hub")
    except (ValueError, RecursionError):
        return ModelFacts(model_id, None, unknown="its config.json on the Hub is not valid JSON")
    if found.architecture:
        _keep(cached, text)
    return found


def _model(name: str, config: Any, source: str) -> ModelFacts:
    try:
        sizes = config if isinstance(config, dict) else {}
        return ModelFacts(name, from_config(sizes), source, config=sizes)
    except UnknownArchitecture as error:
        return ModelFacts(name, None, source, unknown=f"its config.json {error}")


def fetch(model_id: str, revision: str) -> tuple[str | None, str]:
    """(config.json, "") or (None, the predicate of an error whose subject is "the Hub")."""
    from urllib.parse import quote

    from genvalues.common import hub

    path = f"/{model_id}/resolve/{quote(revision, safe='')}/config.json"
    answer = hub.ask(hub.endpoint_of_environment(), path, hub.token_of_environment())
    if not answer.status:
        return None, f"cannot be reached ({answer.problem})"
    if answer.status != 200:
        return None, {
            401: "requires a token with read access (HF_TOKEN, or `hf auth login`)",
            403: "denies access with this token (accept the model's terms there)",
            404: "has no such model or revision",
        }.get(answer.status, f"answers with status {answer.status}")
    if len(answer.body) > MOST_BYTES:
        return None, "has a config.json of more than 1 MiB"
    try:
        return answer.body.decode("utf-8"), ""
    except UnicodeDecodeError:
        return None, "has a config.json that is not text"


def is_offline(environment: Mapping[str, str]) -> bool:
    """HF_HUB_OFFLINE, as huggingface_hub reads it."""
    return environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def cache_file(model_id: str, revision: str) -> Path:
    """The cached config.json of a model: $XDG_CACHE_HOME/llama-lora/models/ID@REVISION.json."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # no home directory
        home = Path("/nonexistent")
    return home / "llama-lora" / "models" / f"{re.sub(r'[^A-Za-z0-9._-]', '--', f'{model_id}@{revision}')}.json"


def _keep(file: Path, text: str) -> None:
    """Write to the cache if possible; else the Hub is asked again next time."""
    from genvalues.common.files import write_text

    with suppress(OSError):
        write_text(file, text)
