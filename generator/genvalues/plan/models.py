"""Where a model's config.json is found: the committed table, a folder on this computer, the cache, the Hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from genvalues.plan.architectures import Architecture, from_config, known

TIMEOUT = 10  # seconds for the Hub's answer
MOST_BYTES = 1 << 20  # of a config.json; the largest have a few kilobytes
HUB = "https://huggingface.co"


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
    text, problem = fetch(f"{endpoint(os.environ)}/{model_id}/resolve/{revision}/config.json", token(os.environ))
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


def fetch(url: str, secret: str | None) -> tuple[str | None, str]:
    """(text, "") or (None, what the Hub did, as one says it). The token is never part of what is said.

    It goes on with a redirection within the Hub, as with huggingface_hub, and to no other host.
    """
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError
    from urllib.parse import urlsplit
    from urllib.request import HTTPRedirectHandler, Request, build_opener

    class Redirections(HTTPRedirectHandler):
        http_error_308 = HTTPRedirectHandler.http_error_302  # Python 3.10 has it not

        def redirect_request(
            self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
        ) -> Request | None:
            further = super().redirect_request(req, fp, 307 if code == 308 else code, msg, headers, newurl)
            if further and urlsplit(newurl)[:2] == urlsplit(req.full_url)[:2]:
                for name, value in req.unredirected_hdrs.items():
                    further.add_unredirected_header(name, value)
            return further

    try:
        request = Request(url, headers={"User-Agent": "genvalues"})
        if secret:
            request.add_unredirected_header("Authorization", f"Bearer {secret}")
        with build_opener(Redirections).open(request, timeout=TIMEOUT) as response:
            data = response.read(MOST_BYTES + 1)
    except HTTPError as error:
        return None, {
            401: "wants a token that may read it (HF_TOKEN, or `hf auth login`)",
            403: "says that this token has no access to it (accept the model's terms there)",
            404: "has no such model or revision",
        }.get(error.code, f"answers {error.code}")
    except (URLError, HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return None, f"cannot be reached ({type(reason).__name__})"
    if len(data) > MOST_BYTES:
        return None, "has a config.json of more than 1 MiB"
    try:
        return data.decode("utf-8"), ""
    except UnicodeDecodeError:
        return None, "has a config.json that is not text"


def is_offline(environment: Mapping[str, str]) -> bool:
    """As huggingface_hub reads HF_HUB_OFFLINE."""
    return environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def endpoint(environment: Mapping[str, str]) -> str:
    return environment.get("HF_ENDPOINT", "").rstrip("/") or HUB


def token(environment: Mapping[str, str]) -> str | None:
    """HF_TOKEN, or what `hf auth login` has left; as huggingface_hub looks for it."""
    if written := environment.get("HF_TOKEN", "").strip():
        return written
    home = environment.get("HF_HOME") or "~/.cache/huggingface"
    try:
        return (Path(home).expanduser() / "token").read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError, RuntimeError):
        return None


def cache_file(model_id: str, revision: str) -> Path:
    """Of a model's config.json: $XDG_CACHE_HOME/llama-lora/models/ID@REVISION.json."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # there is no home
        home = Path("/nonexistent")
    return home / "llama-lora" / "models" / f"{re.sub(r'[^A-Za-z0-9._-]', '--', f'{model_id}@{revision}')}.json"


def _keep(file: Path, text: str) -> None:
    """The cache is a convenience: where it cannot be written, the Hub is asked again next time."""
    from genvalues.files import write_text

    try:
        write_text(file, text)
    except OSError:
        return
