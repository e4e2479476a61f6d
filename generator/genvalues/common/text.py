"""Text from a file, made fit to be printed in an error; and what must never be printed."""

from __future__ import annotations

import re

KeyPath = tuple[str | int, ...]

# Hugging Face, AWS, GitHub, GitLab, OpenAI, Slack, private keys: what their tokens and keys look like. A private key
# goes on to its end, or to the text's, where that was cut.
TOKEN = re.compile(
    r"hf_[A-Za-z0-9]{4,}|api_org_[A-Za-z0-9]{4,}|\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bgl(pat|ptt|dt|rt|cbt|ft|soat|agent|oas|imt|ffct)-[A-Za-z0-9_-][A-Za-z0-9_.-]{18,}[A-Za-z0-9_-]"
    r"|\bgithub_pat_[A-Za-z0-9_]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bxox[a-z]-[A-Za-z0-9-]{10,}"
    r"|-----BEGIN (?s:.*?)(-----END [A-Z0-9 ]*-----|\Z)"
)
# The same rule as in chart/templates/_validations.tpl, for the names of environment variables.
SECRET_NAME = re.compile(r"(?i)(^|_)(token|secret|passw(or)?d|credentials?|(api|access)?key)(_|$)")
SECRET_KEYS = {("huggingFace",), ("huggingFace", "tokenSecret"), ("huggingFace", "tokenKey")}  # where one gets pasted


def dotted(key: KeyPath) -> str:
    """lora.targetModules[1], as one says it."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{one_line(part)}" if text else one_line(part)
    return text


def one_line(text: str, width: int = 80) -> str:
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return shown if len(shown) <= width else shown[: width - 3] + "..."


def number_of(number: float, thing: str) -> str:
    """1 row, 1.5 epochs, 15,011 rows."""
    return f"{number:,.10g} {thing}{'' if number == 1 else 's'}"


def redacted(text: str) -> str:
    """Nothing that looks like a token gets printed."""
    return TOKEN.sub(lambda token: f"{token[0][:3]}...", text)


def may_hold_a_secret(key: KeyPath) -> bool:
    """Whether what is written there must not be repeated."""
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
