"""Damage to the bytes of a file, from a seed: flips, cuts, swaps, huge numbers, deep nesting, wrong types.

``spoiled`` damages the values of parsed JSON, one after the other.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

DEEP = 100_000
WRONG_VALUES: list[Any] = [
    None, True, 0, -1, 1.5, 2**31, 2**63, 10**400, -(10**30), 1e308, "", "x", "x" * 70_000, "../../etc/passwd", "a\0b",
    "\ud800", [], {}, [[]], [None], {"": None}, [1, "a"], {"a": {"b": []}},
]  # fmt: skip
NUMBERS = [b"-1", b"0", b"9" * 5000, b"1e999", b"-1e999", b"NaN", b"Infinity", b"0.5", b"18446744073709551616", b"null"]


def flipped(content: bytes, chance: random.Random) -> bytes:
    """Flip up to eight bits."""
    damaged = bytearray(content)
    for _ in range(chance.randint(1, 8)):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def cut(content: bytes, chance: random.Random) -> bytes:
    """Leave out the end, the beginning, or all of it."""
    at = chance.randrange(len(content))
    return chance.choice([content[:at], content[:at], content[at:], b""])


def swapped(content: bytes, chance: random.Random) -> bytes:
    """Exchange two pieces, or repeat one."""
    first, second, third = sorted(chance.randrange(len(content) + 1) for _ in range(3))
    before, one, two, after = content[:first], content[first:second], content[second:third], content[third:]
    return chance.choice([before + two + one + after, before + one + one + two + after])


def overwritten(content: bytes, chance: random.Random) -> bytes:
    """Overwrite a piece with zeros, ones or noise."""
    at = chance.randrange(len(content))
    size = min(chance.choice([1, 4, 64, 4096]), len(content) - at)
    piece = chance.choice([b"\0" * size, b"\xff" * size, chance.randbytes(size)])
    return content[:at] + piece + content[at + size :]


def appended(content: bytes, chance: random.Random) -> bytes:
    return content + chance.choice([b"\0", b"\n{", b"]", chance.randbytes(64), content])


def renumbered(content: bytes, chance: random.Random) -> bytes:
    """Replace a number in a text by another, or by no number."""
    digits = [at for at in range(len(content)) if content[at : at + 1].isdigit()]
    if not digits:
        return flipped(content, chance)
    at = end = chance.choice(digits)
    while content[end : end + 1].isdigit():
        end += 1
    return content[:at] + chance.choice(NUMBERS) + content[end:]


def nested(content: bytes, chance: random.Random) -> bytes:
    """Insert very many opening brackets, with or without as many closing ones."""
    at = chance.choice([0, chance.randrange(len(content) + 1)])
    opening, closing = chance.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")])
    inner = chance.choice([b"", b"1", b"null"])
    return content[:at] + opening * DEEP + inner + closing * chance.choice([0, DEEP]) + content[at:]


BYTES = [flipped, cut, swapped, overwritten, appended]
TEXT = [*BYTES, renumbered, nested]


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content with one damage that any file can have."""
    return chance.choice(BYTES)(content, chance)


def damaged_text(content: bytes, chance: random.Random) -> bytes:
    """The content with one damage that a text file can have."""
    return chance.choice(TEXT)(content, chance)


def damaged_json(content: bytes, chance: random.Random) -> bytes:
    """A damaged JSON file: half of the time still JSON, with a value, a key or a level that is wrong."""
    try:
        value = json.loads(content)
    except ValueError:  # of several lines
        return damaged_lines(content, chance)
    if chance.random() < 0.4:
        return damaged_text(content, chance)
    return json.dumps(wrong(value, chance)).encode("utf-8", "surrogatepass")


def damaged_lines(content: bytes, chance: random.Random) -> bytes:
    """A damaged file with one JSON value in each line."""
    if chance.random() < 0.4:
        return damaged_text(content, chance)
    lines = content.splitlines()
    at = chance.randrange(len(lines))
    lines[at] = damaged_json(lines[at], chance)
    return b"\n".join(lines) + b"\n"


def damaged_safetensors(content: bytes, chance: random.Random) -> bytes:
    """A damaged safetensors file: half of the time the header is JSON of the right length, with something wrong."""
    if chance.random() < 0.4:
        return chance.choice([damaged(content, chance), struct.pack("<Q", chance.choice(LENGTHS)) + content[8:]])
    (length,) = struct.unpack("<Q", content[:8])
    header = damaged_json(content[8 : 8 + length], chance)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


LENGTHS = [0, 1, 2**16, 2**31, 2**40, 2**63, 2**64 - 1]


def wrong(value: Any, chance: random.Random) -> Any:
    """A value of JSON with one thing in it replaced, left out, renamed, repeated or wrapped."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else []
        for key, each in inner:
            places.append((node, key))
            visit(each)

    visit(value)
    if not places or chance.random() < 0.08:
        return chance.choice(WRONG_VALUES)
    node, key = chance.choice(places)
    how: Callable[[], Any] = chance.choice(
        [
            lambda: node.__setitem__(key, chance.choice(WRONG_VALUES)),
            lambda: node.__setitem__(key, chance.choice(WRONG_VALUES)),
            lambda: node.__setitem__(key, chance.choice(WRONG_VALUES)),
            lambda: node.__delitem__(key),
            lambda: node.__setitem__(key, [node[key]]),
            lambda: node.__setitem__(f"{key}x" if isinstance(node, dict) else key, copy.deepcopy(node)),
            lambda: node.__setitem__(key, chance.choice(places)[0].__class__()),
        ]
    )
    how()
    return value


TEMPLATE_PIECES = [
    "{{ messages[9].content }}", "{{ 1 / 0 }}", "{{ none.x.y }}", "{{ messages + 1 }}", "{{ 'a' * 10 ** 9 }}",
    "{{ 10 ** 10 ** 10 }}", "{% include 'x' %}", "{% extends 'x' %}", "{% import 'x' as x %}", "{{ ''.__class__ }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ range(10 ** 12) | list }}", "{{ [1] | tojson(indent='x') }}",
    "{{ messages | map(attribute='x') | sum }}", "{{ raise_exception('no') }}", "{{ raise_exception(1, 2) }}",
    "{% set x = messages %}{{ x.append(x) }}{{ x | tojson }}", "{% if %}", "{% endfor %}", "{{", "}}", "{%", "{#",
    "{{ messages.pop() }}", "{{ messages[0].update({'content': 5}) }}", "{{ strftime_now('%Q' * 99999) }}",
    "{{ '{:>999999999999}'.format(1) }}", "{{ 'x'.center(10 ** 12) }}", "{{ lipsum() }}", "{{ dict(**messages) }}",
    "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ cycler() }}", "{{ joiner(5)() }}",
    "{{ {} | dictsort(by='x') }}", "{{ 'a' | replace('', 'b' * 9999999) }}", "{{ messages | groupby('x') | list }}",
]  # fmt: skip


def damaged_template(content: bytes, chance: random.Random) -> bytes:
    """A damaged chat template: half of the time with an expression in it that fails, or never ends."""
    if chance.random() < 0.3:
        return damaged_text(content, chance)
    text = content.decode()
    at = chance.randrange(len(text) + 1) if chance.random() < 0.3 else chance.choice([0, len(text)])
    return f"{text[:at]}{chance.choice(TEMPLATE_PIECES)}{text[at:]}".encode()


def spoiled(content: Any, values: Sequence[Any]) -> Iterator[Any]:
    """The content with one value replaced, for each value in it and each of ``values``, and with each key missing."""
    yield from values
    if isinstance(content, dict):
        for key in content:
            yield {other: value for other, value in content.items() if other != key}
            yield from ({**content, key: value} for value in spoiled(content[key], values))
        yield {**content, "../../etc/passwd": next(iter(content.values()), 1), "a\0b": 1}
    elif isinstance(content, list) and content:
        yield from ([value, *content[1:]] for value in spoiled(content[0], values))
