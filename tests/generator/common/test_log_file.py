from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genvalues.common import log_file
from genvalues.common.log_file import BEGIN, END, InvalidLog, content_of, lines_of


@given(st.binary(max_size=2000), st.lists(st.text(max_size=20)), st.lists(st.text(max_size=20)))
def test_a_file_comes_out_of_a_log_as_it_went_in(content: bytes, before: list[str], after: list[str]) -> None:
    noise = [line for line in before if not line.strip().startswith(BEGIN) and line.strip() != END]
    assert content_of([*noise, *lines_of(content), *after]) == content


def test_a_log_that_is_cut_or_damaged_is_refused() -> None:
    lines = list(lines_of(random.Random(1).randbytes(3000)))
    assert len(lines) > 20
    for kept in (lines[:0], lines[:1], lines[:-1], lines[:5] + lines[6:], [*lines[:5], "", "not base64!", *lines[6:]]):
        with pytest.raises(InvalidLog):
            content_of(kept)
    swapped = [*lines[:5], lines[6], lines[5], *lines[7:]]
    with pytest.raises(InvalidLog):
        content_of(swapped)


@pytest.mark.parametrize(
    "first", ["[]", "{", '{"bytes": -1, "sha256": ""}', '{"bytes": 1e99, "sha256": ""}', "[" * 9999]
)
def test_an_invalid_first_line_is_refused(first: str) -> None:
    with pytest.raises(InvalidLog, match="first line"):
        content_of([BEGIN + first, "eJwDAAAAAAE=", END])


def test_what_unpacks_to_more_than_it_says_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *body = lines_of(b"0" * 10_000_000)
    with pytest.raises(InvalidLog, match="another file"):
        content_of([first.replace("10000000", "10"), *body])
    monkeypatch.setattr(log_file, "MOST_BYTES", 100)
    with pytest.raises(InvalidLog, match="too much"):
        list(lines_of(b"0" * 101))
