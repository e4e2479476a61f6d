"""Refuse a tokenizer that makes texts much longer: a tokenizer.json can replace one character by a million, repeatedly.

Its library is written in Rust, which ends the process where memory is short; so the growth is computed beforehand.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from typing import Any

from genvalues.common.errors import UserError

PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
MOST_GROWTH = 100  # characters for one character, before tokens or after them; Llama's make 2, NFKC 18
MOST_SIZE = 1 << 16  # characters of the parts as JSON, which bound the tokens that are put around a text
# The most characters for one (https://unicode.org/faq/normalization.html#12), of the types where it is more than one.
GROWTH = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "BertNormalizer": 6, "Lowercase": 2, "ByteLevel": 2}


def check_growth(tokenizer: dict[str, Any], where: str) -> None:
    """Raise UserError unless a tokenizer, as in tokenizer.json, makes texts only a few times longer."""
    parts = [tokenizer.get(part) for part in PARTS]
    fix = "Use another model, or its original tokenizer.json."
    if (growth := max(_growth(parts[:2]), _growth(parts[3]))) > MOST_GROWTH:
        what = f"{' and '.join(PARTS[:2])}, or {PARTS[3]}, can make {growth:.3g} characters of one"
        raise UserError(f"{what}, the most is {MOST_GROWTH}", where=where, fix=fix)
    if (size := _size(parts)) > MOST_SIZE:
        raise UserError(f"{', '.join(PARTS)} have {size} characters, the most is {MOST_SIZE}", where=where, fix=fix)


def _growth(part: Any) -> float:
    """How many characters a part may make of one, at most; a float, which ends at infinity."""
    if isinstance(part, list):
        return math.prod(map(_growth, part), start=1.0)
    if not isinstance(part, dict):
        return 1.0
    own = GROWTH.get(str(part.get("type")), 1)
    if "content" in part:  # Replace. By their keys, because the library also accepts parts without a type
        pattern = part.get("pattern")
        between = not (isinstance(pattern, dict) and pattern.get("String"))  # it may match the empty text
        own = max(1, len(str(part["content"])) + between)
    elif "prepend" in part:
        own = 1 + len(str(part["prepend"]))
    elif "precompiled_charsmap" in part:
        own = _longest(str(part["precompiled_charsmap"]))
    elif "trim_offsets" in part:
        own = GROWTH["ByteLevel"]
    return own * _growth(list(part.values()))


def _longest(charsmap: str) -> int:
    """The longest text that SentencePiece's map of characters writes for a character.

    The size of a trie, the trie, and the texts with a zero after each:
    https://github.com/google/sentencepiece/blob/master/src/normalizer.cc (DecodePrecompiledCharsMap).
    """
    try:
        content = base64.b64decode(charsmap)
    except (binascii.Error, ValueError):
        return 1  # which the library refuses
    texts = content[4 + int.from_bytes(content[:4], "little") :].split(b"\0")
    return max(1, *(len(text.decode(errors="replace")) for text in texts))


def _size(parts: list[Any]) -> int:
    return len(json.dumps(parts)) - sum(map(_charsmaps, parts))


def _charsmaps(part: Any) -> int:
    if isinstance(part, dict):
        return len(str(part.get("precompiled_charsmap", ""))) + _charsmaps(list(part.values()))
    return sum(map(_charsmaps, part)) if isinstance(part, list) else 0
