"""Asking the Hugging Face Hub, or what is in its place (HF_ENDPOINT), without its library: one request, one answer.

The token goes to the Hub alone and is never part of what is said.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from genvalues.common.text import one_line, redacted

if TYPE_CHECKING:
    import ssl

SECONDS = 10.0
REDIRECTS = 5
LARGEST_ANSWER = 32 << 20  # a dataset of many files has a long list of them


@dataclass(frozen=True)
class Answer:
    """What the Hub answers: 0 is no answer at all. Its own words for an error are in two headers (huggingface_hub,
    utils/_http.py)."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)  # names in small letters
    body: bytes = b""
    problem: str = ""

    @property
    def error(self) -> str:
        return self.headers.get("x-error-code", "")

    @property
    def message(self) -> str:
        return one_line(redacted(self.headers.get("x-error-message", "")), 200)

    def json(self) -> dict[str, Any]:
        try:
            value = json.loads(self.body)
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}


def endpoint_of_environment() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def token_of_environment() -> str:
    """The token that huggingface_hub would use here: $HF_TOKEN, else the file that `hf auth login` writes.

    Never printed. Empty where there is none.
    """
    if token := os.environ.get("HF_TOKEN", "").strip():
        return token
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")  # noqa: PTH118
    path = os.environ.get("HF_TOKEN_PATH") or os.path.join(home, "token")  # noqa: PTH118
    try:
        return Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, RuntimeError, UnicodeDecodeError):
        return ""


def ask(endpoint: str, path: str, token: str, method: str = "GET") -> Answer:
    """One request; a redirect is followed on the Hub itself alone, so that nobody else gets the token.

    One to a file store elsewhere is an answer: the file may be read.
    """
    url = f"{endpoint}{path}"
    for _ in range(REDIRECTS):
        answer = send(url, token, method)
        if answer.status not in (301, 302, 303, 307, 308):
            return answer
        url = urljoin(url, answer.headers.get("location", ""))
        if urlsplit(url)[:2] != urlsplit(endpoint)[:2]:
            return answer
    return Answer(0, problem="too many redirects")


def trusted() -> ssl.SSLContext:
    """The system's certificates and those of $REQUESTS_CA_BUNDLE, as huggingface_hub has them behind a proxy; certifi's
    where the system has none (Python from python.org on a Mac)."""
    import ssl

    context = ssl.create_default_context()
    if bundle := os.environ.get("REQUESTS_CA_BUNDLE"):
        context.load_verify_locations(bundle)
    elif not context.cert_store_stats()["x509_ca"]:
        import certifi  # comes with the Kubernetes client

        context.load_verify_locations(certifi.where())
    return context


def send(url: str, token: str, method: str) -> Answer:
    import http.client
    import urllib.error
    import urllib.request

    class NoRedirects(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *arguments: Any, **options: Any) -> None:
            return None

    try:
        request = urllib.request.Request(url, method=method, headers={"User-Agent": "genvalues"})
        if token:
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        try:
            opener = urllib.request.build_opener(NoRedirects, urllib.request.HTTPSHandler(context=trusted()))
            with opener.open(request, timeout=SECONDS) as response:
                return Answer(response.status, small(response.headers), response.read(LARGEST_ANSWER))
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, small(error.headers))
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", None) or error
        return Answer(0, problem=one_line(redacted(str(reason) or type(error).__name__), 200))


def small(headers: Any) -> dict[str, str]:
    """http.client's, of which any spelling of a name is the same."""
    return {name.lower(): value for name, value in headers.items()}
