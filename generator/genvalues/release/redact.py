"""What leaves the cluster in a bundle: nothing that looks like a secret, and no AWS account's number.

Two passes, each of which is enough for most: over objects, by the names of environment variables and keys; and over the
text of every file, by what tokens look like and by NAME=VALUE with a name that says it is secret.
"""

from __future__ import annotations

import re
from typing import Any

from genvalues.wording import SECRET_NAME, TOKEN

HIDDEN = "(redacted)"
# Accounts of AWS's own registries, which a reader of a bug report needs and everybody knows: the Deep Learning
# Containers' (https://github.com/aws/deep-learning-containers/blob/master/available_images.md).
PUBLIC_ACCOUNTS = {"763104351884"}
ACCOUNT = re.compile(r"(?<![\w.-])\d{12}(?![\w-])")
ANY_ACCOUNT = "000000000000"
# A tokenizer's tokens are no secrets, and a bug report may be about them.
NO_SECRETS = re.compile(r"(?i)^(bos|eos|pad|unk|cls|sep|mask|num|max|new|input|output|total|prompt)_token(_ids?)?$")
SECRET_WORD = re.compile(
    r"(?i)(?:^|[-_])(?:(?:session[-_]?)?token|secret|passw(?:or)?d|credentials?|signature"
    r"|(?:secret[-_]?)?access[-_]?key|api[-_]?key)(?:$|[-_])"
)
# NAME= and NAME: before a value, also quoted, or quoted in a text that is quoted itself. A name begins where no other
# could have begun before, so that a long text is gone through once.
NAMED = re.compile(r"""(?P<name>(?<![A-Za-z0-9_-])[A-Za-z0-9_-]+)\\*["']?\s*[=:]\s*\\*["']?""")
VALUE = re.compile(r"""[^\s"'\\,;&}]+""")
BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}")
IN_URL = re.compile(r"(?<=://)[^\s/@:]+:[^\s/@]+(?=@)")  # https://user:password@host
# kubectl's own copy of an object as text, and who wrote which field.
DROPPED = {"kubectl.kubernetes.io/last-applied-configuration", "managedFields"}


def redact_object(value: Any) -> Any:
    """The same object without the values of what is named like a secret."""
    if isinstance(value, list):
        return [redact_object(one) for one in value]
    if not isinstance(value, dict):
        return redact_text(value) if isinstance(value, str) else value
    name = value.get("name")
    if isinstance(name, str) and "value" in value and is_secret(name):  # an environment variable
        return {**{key: redact_object(inner) for key, inner in value.items()}, "value": HIDDEN}
    return {
        redact_text(key) if isinstance(key, str) else key: (
            HIDDEN
            if isinstance(key, str) and is_secret(key) and isinstance(inner, (str, int, float)) and inner != ""
            else redact_object(inner)
        )
        for key, inner in value.items()
        if key not in DROPPED
    }


def is_secret(name: str) -> bool:
    """By the rule for environment variables; a tokenizer's special tokens apart."""
    return bool(SECRET_NAME.search(name)) and not NO_SECRETS.match(name)


def redact_text(text: str) -> str:
    """The same text without what looks like a secret, and without account numbers."""
    text = TOKEN.sub(lambda token: f"{token[0][:3]}{HIDDEN}", text)
    text = BEARER.sub(lambda found: f"{found[1]} {HIDDEN}", text)
    text = IN_URL.sub(HIDDEN, text)
    text = without_named_secrets(text)
    return ACCOUNT.sub(lambda found: found[0] if found[0] in PUBLIC_ACCOUNTS else ANY_ACCOUNT, text)


def without_named_secrets(text: str) -> str:
    """The same text without what stands behind a name that says it is secret."""
    parts, done = [], 0
    for found in NAMED.finditer(text):
        if found.start() < done or not SECRET_WORD.search(found["name"]) or NO_SECRETS.match(found["name"]):
            continue
        if (value := VALUE.match(text, found.end())) and value[0] != HIDDEN:
            parts += [text[done : found.end()], HIDDEN]
            done = value.end()
    return "".join([*parts, text[done:]])
