"""What a process may use of this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llama_lora import environment


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("", {"cpu.max": "300000 100000"}, 3),
        ("", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "399999 100000"}, 3),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "500000 100000"}, 4),
        ("0::/of/the/node", {"cpu.max": "200000 100000"}, 2),
        ("0::/a", {"b/cpu.max": "100000 100000"}, 8),
        ("4:cpu,cpuacct:/a", {"cpu,cpuacct/a/cpu.cfs_quota_us": "200", "cpu,cpuacct/a/cpu.cfs_period_us": "50"}, 4),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "200000", "cpu/a/cpu.cfs_period_us": "100000"}, 2),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("5:cpuset:/a\n4:cpu:/b", {"cpu/a/cpu.cfs_quota_us": "1", "cpu/a/cpu.cfs_period_us": "1"}, 8),
    ],
)  # fmt: skip
def test_cores_are_the_whole_ones_that_every_cgroup_around_the_process_allows(
    cgroup: str, files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    if cgroup:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(f"{cgroup}\n")
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    assert environment.available_cores(tmp_path) == cores


def test_cores_are_no_more_than_the_process_may_run_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5}, raising=False)
    assert environment.available_cores(tmp_path) == 2


def test_memory_is_that_of_the_cgroups_around_the_process(tmp_path: Path) -> None:
    for name, text in {
        "proc/self/statm": "900 0 20 1 0 30 0",
        "proc/self/cgroup": "0::/a/b",
        "sys/fs/cgroup/a/memory.max": "4096000",
        "sys/fs/cgroup/a/b/memory.max": "max",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 8000 kB\n")
    assert environment.available_memory(tmp_path) == 4096000


@pytest.mark.parametrize(
    ("set_by_user", "policy", "spins"),
    [
        ({}, "passive", "10000"),
        ({"OMP_WAIT_POLICY": "active"}, "active", None),
        ({"GOMP_SPINCOUNT": "5"}, "passive", "5"),
    ],
)
def test_threads_spin_briefly_unless_the_user_has_decided(
    set_by_user: dict[str, str], policy: str, spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(set_by_user))
    environment.limit_spinning()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ.get("GOMP_SPINCOUNT")) == (policy, spins)
