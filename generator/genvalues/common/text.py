"""Format text for messages, and recognise what must not be printed."""

from __future__ import annotations

import re
from collections.abc import Sequence

KeyPath = tuple[str | int, ...]

# Tokens of Hugging Face, AWS, GitHub, GitLab, OpenAI, Slack, Google, npm, PyPI, Docker and Kubernetes (JSON web tokens
# and those of EKS), and private keys, up to their end or the end of a truncated text.
TOKEN = re.compile(
    r"hf_[A-Za-z0-9]{4,}|api_org_[A-Za-z0-9]{4,}|\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bgl(pat|ptt|dt|rt|cbt|ft|soat|agent|oas|imt|ffct)-[A-Za-z0-9_-][A-Za-z0-9_.-]{18,}[A-Za-z0-9_-]"
    r"|\bgithub_pat_[A-Za-z0-9_]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bxox[a-z]-[A-Za-z0-9-]{10,}"
    r"|\bxapp-[A-Za-z0-9-]{10,}|\bAIza[A-Za-z0-9_-]{35}|\bya29\.[A-Za-z0-9_-]{20,}|\bnpm_[A-Za-z0-9]{30,}"
    r"|\bpypi-[A-Za-z0-9_-]{40,}|\bdckr_pat_[A-Za-z0-9_-]{20,}"
    r"|\beyJ[A-Za-z0-9_-]{5,}(\.[A-Za-z0-9_-]*){1,4}|\bk8s-aws-v1\.[A-Za-z0-9_-]{20,}"
    r"|-----BEGIN (?s:.*?)(-----END [A-Z0-9 ]*-----|\Z)"
)
# Names of environment variables; the same rule as in chart/templates/_validations.tpl.
SECRET_NAME = re.compile(r"(?i)(^|_)(token|secret|passw(or)?d|credentials?|(api|access)?key)(_|$)")
SECRET_KEYS = {
    ("huggingFace",),
    ("huggingFace", "tokenSecret"),
    ("huggingFace", "tokenKey"),
    ("publish", "hub", "tokenSecret"),
    ("publish", "hub", "tokenKey"),
    ("monitoring", "secretName"),
}  # where users paste tokens


def dotted(key: KeyPath) -> str:
    """A key path as text: lora.targetModules[1]."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{one_line(part)}" if text else one_line(part)
    return text


def one_line(text: str, width: int = 80) -> str:
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return shown if len(shown) <= width else shown[: width - 3] + "..."


def number_of(number: float, thing: str) -> str:
    """A number with its noun: 1 row, 1.5 epochs, 15,011 rows."""
    return f"{number:,.10g} {thing}{'' if number == 1 else 's'}"


def redacted(text: str) -> str:
    """The text with every token replaced by its first characters and dots."""
    return TOKEN.sub(lambda token: f"{token[0][:3]}...", text)


def has_surrogate(text: str) -> bool:
    """Whether no encoding has the text: half a character, or Python's substitute for a byte that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def is_web_address(text: str, others: Sequence[str] = ()) -> bool:
    """Whether a text is a URL with a host, of http, https or one of the ``others``."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(text)
        known = parts.scheme in ("http", "https", *others)
        return known and bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", text)
    except ValueError:  # of the port, or of an IPv6 address
        return False


def may_hold_a_secret(key: KeyPath) -> bool:
    """Whether the value of this key must not be printed."""
    return key in SECRET_KEYS or any(isinstance(part, str) and SECRET_NAME.search(part) for part in key)


def duration(seconds: float) -> str:
    """``48 s``, ``12 min 05 s`` or ``3 h 20 min``."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def camel_case(name: str) -> str:
    """``per_device_batch_size`` as values spell it: ``perDeviceBatchSize``."""
    first, *others = name.split("_")
    return first + "".join(other.title() for other in others)
