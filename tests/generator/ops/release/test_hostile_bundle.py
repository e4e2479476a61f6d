"""about.json of a support bundle, of any content: refused in a line."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from genvalues.common.errors import UserError
from genvalues.ops.bundle import ABOUT, FORMAT, VALUES, read_bundle

DEEP = ["[" * 1_000_000, '{"format":' * 5000 + "1" + "}" * 5000]
FORMATS: list[Any] = [None, True, 1.5, "1", [], {}, 10**400, "\x1b[31m\nx"]


def bundle(path: Path, about: str, values: str = "a: 1\n") -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in {ABOUT: about, VALUES: values}.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


@pytest.mark.parametrize(
    "about",
    ["", "[]", "null", '"a"', "5", "{}", "{", *DEEP, *(json.dumps({"format": value}) for value in FORMATS)],
    ids=lambda text: text[:20],
)
def test_about_of_any_content_is_refused_in_a_line(tmp_path: Path, about: str) -> None:
    with pytest.raises(UserError) as refused:
        read_bundle(bundle(tmp_path / "b.tar.gz", about))
    assert "bundle" in refused.value.what
    assert len(str(refused.value).splitlines()) == 1 and "\x1b" not in str(refused.value)


def test_values_that_would_take_minutes_to_parse_are_refused_in_a_line(tmp_path: Path) -> None:
    values = "".join(f"k{number}: 1\n" for number in range(400_000))
    with pytest.raises(UserError, match=r"bundle/values\.yaml is larger than 256 KiB\. Use"):
        read_bundle(bundle(tmp_path / "b.tar.gz", json.dumps({"format": FORMAT}), values))


def test_a_bundle_of_this_format_is_read(tmp_path: Path) -> None:
    about, values = read_bundle(bundle(tmp_path / "b.tar.gz", json.dumps({"format": FORMAT})))
    assert about["format"] == FORMAT and values == "a: 1\n"
