"""What leaves the cluster in a bundle: nothing that looks like a secret, and no AWS account's number.

Two passes, each of which is enough for most: over objects, by the names of environment variables, keys and options; and
over the text of every file, by what tokens look like and by NAME=VALUE with a name that says it is secret.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from genvalues.common.text import SECRET_NAME, TOKEN

HIDDEN = "(redacted)"
# Accounts of AWS's own registries, which a reader of a bug report needs and everybody knows: the Deep Learning
# Containers' (https://github.com/aws/deep-learning-containers/blob/master/available_images.md).
PUBLIC_ACCOUNTS = {"763104351884"}
# Twelve digits, also within a bucket's name; not those of a decimal, and not in what stands before: a UUID, a digest or
# fingerprint, and the 17 digits of an AWS resource's id.
ACCOUNT = re.compile(
    r"(?<![0-9A-Za-z])(?:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32,128}|[a-z]{1,12}-[0-9a-f]{17})"
    r"(?![0-9A-Za-z])"
    r"|(?<!\d)(?<!\d\.)(?P<account>\d{12})(?!\d|\.\d)"
)
ANY_ACCOUNT = "000000000000"

# hfToken, DB_PASS and clientSecret are said in words: hf token, db pass, client secret.
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
ENDINGS = ("password", "passwd", "passphrase", "passcode", "secret", "apikey", "accesskey", "privatekey", "secretkey")
PHRASES = ENDINGS[:4]
SECRET_WORDS = {"token", "credential", "credentials", "signature", "authtoken", "accesstoken", "refreshtoken"}
SECRET_WORDS |= {"identitytoken", "registrytoken"}  # in Docker's config.json
LAST_WORDS = {"auth", "authorization", "cookie", "pass", "pw", "pwd"}  # first ones say something else: authMode
KEYS_OF = {"access", "api", "auth", "client", "encryption", "master", "private", "secret", "signing", "ssh"}
# What is told about a secret: its name, which mode, how many.
ABOUT_SECRETS = {"count", "length", "limit", "mode", "modes", "name", "ref", "second", "seconds", "size", "type"}
# A tokenizer's tokens are no secrets, and a bug report may be about them; nor are the chart's own names of a Secret and
# its key.
NO_SECRETS = re.compile(
    r"(bos|eos|pad|unk|cls|sep|mask|num|max|new|input|output|total|prompt|special|per|max_new)_token(_ids?)?|token_ids?"
    r"|token_secret|token_key|existing_secret|(forward|backward)_pass"
)
WORKING_FOLDERS = {"PWD", "OLDPWD"}  # the shell's
FEW = re.compile(r"\d{1,3}|\d+\.\d+")  # "loss per token: 1.25" and "second pass: 12"
NO_VALUE = {"true", "false", "null", "None", "{", "["}  # what YAML, JSON and Python write where no text is
# NAME= and NAME: before a value, also quoted, or quoted in a text that is quoted itself; and --NAME before one, also in
# a list. A name begins where no other could have begun before, so that a long text is gone through once.
NAMED = re.compile(
    r"""(?<![A-Za-z0-9_-])(?P<name>[A-Za-z0-9_-]+)\\*["']?"""
    r"""(?:[ \t]*[=:][ \t]*|(?P<option>[ \t]*,\s*|[ \t]+|[ \t]*\n\s*-[ \t]+)(?!-))(?P<quote>\\*["'])?"""
)
VALUE = re.compile(r"""[^\s"'\\,;&}]+""")
REST_OF_LINE = re.compile(r"[^\n]*")
QUOTED = {"'": re.compile(r"(?:[^'\n]|'')*(?=')"), '"': re.compile(r'(?:[^"\\\n]|\\.)*(?=")')}
AUTHORIZATION = re.compile(  # the scheme stays
    r"""(?i)(\bauthorization\\*["']?[ \t]*[=:][ \t]*\\*["']?"""
    r"""(?:(?:basic|bearer|digest|negotiate|token)[ \t]+)?)[^\s"'\\]+"""
)
BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}")
JWT = re.compile(r"\beyJ[A-Za-z0-9_-]{5,}(?:\.[A-Za-z0-9_-]*){1,4}")  # RFC 7519: base64 of {"
IN_URL = re.compile(r"(?<=://)[^\s/@:]+:[^\s/@]+(?=@)")  # https://user:password@host
# kubectl's own copy of an object as text, and who wrote which field.
DROPPED = {"kubectl.kubernetes.io/last-applied-configuration", "managedFields"}


def redact_object(value: Any) -> Any:
    """The same object without the values of what is named like a secret."""
    if isinstance(value, list):
        return redact_list(value)
    if not isinstance(value, dict):
        return redact_text(value) if isinstance(value, str) else value
    name = value.get("name")
    if isinstance(name, str) and "value" in value and is_secret(name):  # an environment variable
        return {**{key: redact_object(inner) for key, inner in value.items()}, "value": HIDDEN}
    return {
        redact_text(key) if isinstance(key, str) else key: (
            hidden(inner) if isinstance(key, str) and key != "key" and is_secret(key) else redact_object(inner)
        )
        for key, inner in value.items()
        if key not in DROPPED
    }


def redact_list(items: list[Any]) -> list[Any]:
    """A value behind its option, as in a container's args, goes with it."""
    after_option = [False, *(isinstance(before, str) and is_secret_option(before) for before, _ in pairwise(items))]
    return [
        HIDDEN if follows and isinstance(item, str) and not item.startswith("-") else redact_object(item)
        for item, follows in zip(items, after_option, strict=False)
    ]


def hidden(value: Any) -> Any:
    """What a secret's name stands before: its text or number, or a list of them. A flag is none, e.g. whether a service
    account's token is mounted; and an object says more."""
    if isinstance(value, list):
        return [hidden(item) for item in value]
    if isinstance(value, dict):
        return redact_object(value)
    return value if isinstance(value, bool) or value in (None, "") else HIDDEN


def is_secret(name: str) -> bool:
    """By the rule for environment variables, and by that for names in a text."""
    return is_secret_in_text(name) or (bool(SECRET_NAME.search(name)) and not is_told_about(words_of(name)))


def is_secret_in_text(name: str) -> bool:
    """Whether a name, in whatever spelling, says that what follows is secret."""
    words = words_of(name)
    if not words or name in WORKING_FOLDERS or is_told_about(words):
        return False
    return (
        words[-1] in LAST_WORDS
        or any(word in SECRET_WORDS or word.endswith(ENDINGS) for word in words)
        or any(whose in KEYS_OF and word == "key" for whose, word in pairwise(words))
    )


def is_secret_option(text: str) -> bool:
    return text.startswith("--") and "=" not in text and " " not in text and is_secret_in_text(text)


def words_of(name: str) -> list[str]:
    return [word.lower() for word in WORD.findall(name)]


def is_told_about(words: list[str]) -> bool:
    return bool(words) and (words[-1] in ABOUT_SECRETS or bool(NO_SECRETS.fullmatch("_".join(words))))


def redact_text(text: str) -> str:
    """The same text without what looks like a secret, and without account numbers."""
    text = TOKEN.sub(lambda token: f"{token[0][:3]}{HIDDEN}", text)
    text = JWT.sub(HIDDEN, text)
    text = AUTHORIZATION.sub(lambda found: found[1] + HIDDEN, text)
    text = BEARER.sub(lambda found: f"{found[1]} {HIDDEN}", text)
    text = IN_URL.sub(HIDDEN, text)
    text = without_named_secrets(text)
    return ACCOUNT.sub(without_account, text)


def without_account(found: re.Match[str]) -> str:
    return ANY_ACCOUNT if found["account"] and found["account"] not in PUBLIC_ACCOUNTS else found[0]


def without_named_secrets(text: str) -> str:
    """The same text without what stands behind a name that says it is secret."""
    parts, done, at = [], 0, 0
    while found := NAMED.search(text, at):
        at = found.end("name")  # what stands behind may be a name itself
        name = found["name"]
        if (found["option"] is not None and not name.startswith("--")) or not is_secret_in_text(name):
            continue
        if name.lower() == "authorization":  # hidden above, and its scheme left
            continue
        end = end_of_value(text, found)
        value = text[found.end() : end]
        if not value or HIDDEN in value or value in NO_VALUE or (name in ("pass", "token") and FEW.fullmatch(value)):
            continue
        parts += [text[done : found.end()], HIDDEN]
        done = at = end
    return "".join([*parts, text[done:]])


def end_of_value(text: str, found: re.Match[str]) -> int:
    """A quoted one goes on to its quote, or to the end of a line that was cut; another to what ends a word. A cookie
    has the line, and so has a password that is a YAML file's key: only those have words without quotes around them."""
    begins, quote, words = found.end(), found["quote"] or "", words_of(found["name"])
    if len(quote) > 1:  # quoted in a text that is quoted itself
        value = re.compile(rf"[^\n]*?(?={re.escape(quote)})").match(text, begins) or REST_OF_LINE.match(text, begins)
    elif quote:
        value = QUOTED[quote].match(text, begins) or REST_OF_LINE.match(text, begins)
    elif words[-1] == "cookie" or (words[-1].endswith(PHRASES) and is_yaml_key(text, found)):
        value = REST_OF_LINE.match(text, begins)
    else:
        value = VALUE.match(text, begins)
    return value.end() if value else begins


def is_yaml_key(text: str, found: re.Match[str]) -> bool:
    before = text[max(0, found.start() - 80) : found.start()].rpartition("\n")[2]
    return not before.strip(" -") and text[found.end("name") : found.end()] == ": "
