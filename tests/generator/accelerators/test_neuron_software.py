"""Drivers and runtimes of AWS's Neuron software: what works together, and what each release contains."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from genvalues.accelerators.neuron_software import (
    RELEASES,
    driver_of_ami,
    driver_of_node,
    mismatch,
    release_of_sdk,
    version_of,
)
from genvalues.common.neuron_files import driver_version, runtime_version

ROOT = Path(__file__).parents[3]
STATUS = """Package: aws-neuronx-runtime-lib
Status: {status}
Version: 2.30.51.0-0b044f4ce

Package: aws-neuronx-runtime-lib-extra
Status: install ok installed
Version: 9.9.9.9
"""


@pytest.mark.parametrize(
    ("driver", "runtime", "words"),
    [
        ("2.29.0.0", "2.28.23.0", ["needs Neuron runtime 2.33", "2.28.23.0", "driver 2.28 and older", "v20260625"]),
        ("2.31.8.0", "2.32.31.0", ["needs Neuron runtime 2.33", "2.32.31.0"]),
        ("2.26.10.0", "2.32.31.0", ["too old", "2.27"]),
        ("2.28.0.0", "2.28.23.0", []),
        ("2.24.7.0", "2.28.19.0", []),
        ("2.29.0.0", "2.33.10.0", []),
        ("2.26.10.0", "2.35.30.0", []),  # AWS documents no limit
        ("", "2.28.23.0", []),
        ("2.31.7.0", "", []),
        ("built by hand", "2.28.23.0", []),
    ],
)
def test_a_pair_that_cannot_start_says_what_each_needs(driver: str, runtime: str, words: list[str]) -> None:
    found = " ".join(mismatch(driver, runtime) or ())
    assert bool(found) == bool(words) and all(word in found for word in words), found


def test_driver_and_runtime_of_one_release_work_together() -> None:
    assert [release for release in RELEASES if mismatch(release.driver, release.runtime)] == []
    assert all(older.date < newer.date and older.driver < newer.driver for older, newer in pairwise(RELEASES))


@pytest.mark.parametrize(
    ("os_image", "driver"),
    [
        ("Amazon Linux 2023.12.20260710", "2.29"),
        ("Amazon Linux 2023.13.20261101", "2.29"),
        ("Amazon Linux 2023.12.20260622", "2.28"),
        ("Amazon Linux 2023.11.20260413", "2.27"),
        ("Amazon Linux 2023.7.20250512", ""),
        ("Amazon Linux 2", ""),
        ("Bottlerocket OS 1.50.0 (aws-k8s-1.34)", ""),
        ("", ""),
    ],
)
def test_the_driver_of_an_eks_ami_follows_from_its_release_of_amazon_linux(os_image: str, driver: str) -> None:
    assert driver_of_node(os_image) == driver


@pytest.mark.parametrize(
    ("name", "driver"),
    [
        ("amazon-eks-node-al2023-x86_64-neuron-1.34-v20260714", "2.29"),
        ("amazon-eks-node-al2023-x86_64-neuron-1.36-v20260625", "2.28"),
        ("amazon-eks-node-al2023-x86_64-neuron-1.30-v20250101", ""),
        ("amazon-eks-node-al2023-x86_64-standard-1.34-v20260714", ""),
        ("our-own-ami", ""),
    ],
)
def test_the_driver_of_an_eks_ami_follows_from_its_name(name: str, driver: str) -> None:
    assert driver_of_ami(name) == driver


def test_a_release_is_found_by_the_sdk_in_an_images_tag() -> None:
    assert [(release.sdk, release.runtime) for sdk in ("2.26.1", "2.30.0") if (release := release_of_sdk(sdk))] == [
        ("2.26", "2.28.19.0"),
        ("2.30", "2.32.31.0"),
    ]
    assert release_of_sdk("2.99.0") is None and release_of_sdk("newest") is None
    assert version_of("2.31.24.0-0b044f4ce") == (2, 31)


def test_the_driver_is_that_of_the_loaded_module(tmp_path: Path) -> None:
    assert driver_version(tmp_path) == ""
    file = tmp_path / "sys/module/neuron/version"
    file.parent.mkdir(parents=True)
    file.write_text("2.28.0.0\n")
    assert driver_version(tmp_path) == "2.28.0.0"


def test_the_runtime_is_the_library_that_programs_load_although_an_older_one_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "opt/aws/neuron/lib"
    folder.mkdir(parents=True)
    for version in ("2.28.23.0", "2.33.10.0"):
        (folder / f"libnrt.so.{version}").touch()
    (folder / "libnrt.so.1").symlink_to("libnrt.so.2.33.10.0")
    assert runtime_version(tmp_path) == "2.33.10.0"
    (folder / "libnrt.so.1").unlink()
    (folder / "libnrt.so.1").symlink_to("/opt/aws/neuron/lib/libnrt.so.2.28.23.0")
    assert runtime_version(tmp_path) == "2.28.23.0"


@pytest.mark.parametrize(
    ("status", "version"), [("install ok installed", "2.30.51.0"), ("deinstall ok config-files", "")]
)
def test_the_runtime_is_in_dpkgs_list_where_the_librarys_name_has_no_version(
    tmp_path: Path, status: str, version: str
) -> None:
    (tmp_path / "opt/aws/neuron/lib").mkdir(parents=True)
    (tmp_path / "opt/aws/neuron/lib/libnrt.so.1").touch()
    file = tmp_path / "var/lib/dpkg/status"
    file.parent.mkdir(parents=True)
    file.write_text(STATUS.format(status=status))
    assert runtime_version(tmp_path) == version


def test_the_table_of_the_docs_has_every_release() -> None:
    page = (ROOT / "docs/neuron-xla.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (2\.\d\d) \(\w+ \d{4}\) \| ([\d.]+) \| ([\d.]+) \|", page, re.MULTILINE)
    assert rows == [(release.sdk, release.driver, release.runtime) for release in RELEASES]


@pytest.mark.parametrize("page", ["README.md", "docs/neuron.md", "docs/neuron-xla.md"])
def test_the_end_of_training_on_trn1_is_at_the_top(page: str) -> None:
    top = " ".join((ROOT / page).read_text(encoding="utf-8").split("\n## ")[0].split())
    for words in ("PyTorch/XLA", "SDK 2.30 (May 2026", "2.26.1", "2.30.0", "Trn1", "driver"):
        assert words in top, words
