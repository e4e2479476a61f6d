"""Requests to the Hugging Face Hub, or to the server that HF_ENDPOINT names, without its library.

The token is sent to that server only, and never appears in an answer or an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urljoin, urlsplit

from genvalues.common.text import one_line, redacted

if TYPE_CHECKING:
    import ssl

SECONDS = 10.0  # for each read
SECONDS_IN_ALL = 60.0
REDIRECTS = 5
Found = TypeVar("Found")
LARGEST_ANSWER = 32 << 20  # bytes; a dataset with many files has a long list of them


@dataclass(frozen=True)
class Answer:
    """The Hub's answer; status 0 if there is none, with the reason in ``problem``. Two headers hold the code and the
    message of an error (huggingface_hub, utils/_http.py)."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)  # names in lower case
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
    """The token that huggingface_hub uses on this machine: $HF_TOKEN, or else the file that `hf auth login` writes.

    Empty if there is neither. Must never be printed.
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
    """Send a request. Redirects are followed within the Hub only, so that no other server gets the token.

    A redirect to a file store elsewhere is returned as the answer: it shows that the file is readable.
    """
    url = f"{endpoint}{path}"
    for _ in range(REDIRECTS):
        answer = request_once(url, token, method)
        if answer.status not in (301, 302, 303, 307, 308):
            return answer
        url = urljoin(url, answer.headers.get("location", ""))
        if urlsplit(url)[:2] != urlsplit(endpoint)[:2]:
            return answer
    return Answer(0, problem="too many redirects")


@cache
def trusted_certificates(bundle: str | None) -> ssl.SSLContext:
    """The system's certificates and those of ``bundle``, or those of certifi if the system has none (Python from
    python.org on a Mac). They take a tenth of a second to read."""
    import ssl

    context = ssl.create_default_context()
    if bundle:
        context.load_verify_locations(bundle)
    elif not context.cert_store_stats()["x509_ca"]:
        import certifi  # a dependency of the Kubernetes client

        context.load_verify_locations(certifi.where())
    return context


def within_time(ask: Callable[[], Found]) -> Found:
    """What ``ask`` returns. Raises TimeoutError after SECONDS_IN_ALL, also if the server sends a byte now and then."""
    import threading
    from concurrent import futures

    answer: futures.Future[Found] = futures.Future()

    def work() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # which ends with its request, or with the command
    try:
        return answer.result(SECONDS_IN_ALL)
    except futures.TimeoutError:  # not the same as TimeoutError in Python 3.10
        raise TimeoutError(f"the answer takes longer than {SECONDS_IN_ALL:.0f} s") from None


def request_once(url: str, token: str, method: str) -> Answer:
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
            trusted = trusted_certificates(os.environ.get("REQUESTS_CA_BUNDLE"))  # huggingface_hub reads it, too
            opener = urllib.request.build_opener(NoRedirects, urllib.request.HTTPSHandler(context=trusted))

            def get() -> Answer:
                with opener.open(request, timeout=SECONDS) as response:
                    return Answer(response.status, lower_case(response.headers), response.read(LARGEST_ANSWER))

            return within_time(get)
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, lower_case(error.headers))
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", None) or error
        return Answer(0, problem=one_line(redacted(str(reason) or type(error).__name__), 200))


def lower_case(headers: Any) -> dict[str, str]:
    """The headers with names in lower case: HTTP names are case-insensitive."""
    return {name.lower(): value for name, value in headers.items()}
