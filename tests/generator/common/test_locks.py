"""Locks between processes: one holder at a time, told to those who wait, and gone with a killed holder."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from genvalues.common import locks
from genvalues.common.errors import UserError
from genvalues.common.locks import lock_beside, locked

HOLD = """
import sys
from pathlib import Path
from genvalues.common.locks import locked
with locked(Path(sys.argv[1]), "llama-lora merge", remove=len(sys.argv) > 2):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(file: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until its input ends."""
    command = [sys.executable, "-c", HOLD, str(file), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_the_second_is_told_for_whom_it_waits_and_refused_after_a_bounded_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = lock_beside(tmp_path / "merged")
    assert file == tmp_path / ".merged.lock"
    caplog.set_level(logging.INFO)
    with holder(file) as process:
        with pytest.raises(UserError) as refused, locked(file, "llama-lora merge", 0.5):
            pytest.fail("both hold it")
        who = f"llama-lora merge (process {process.pid} on "
        assert refused.value.what.startswith(f"still locked after 0 s by {who}") or who in refused.value.what
        assert refused.value.where == str(file) and "stop it" in refused.value.fix
        assert [record.message for record in caplog.records if who in record.message] == caplog.messages
        assert who in file.read_text(), "the one that was refused has not changed what the holder wrote"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_holder_leaves_no_lock(tmp_path: Path, number: signal.Signals) -> None:
    file = tmp_path / "lock"
    with holder(file) as process:
        process.send_signal(number)
        process.wait()
        began = time.monotonic()
        with locked(file, "next", 5.0):
            assert time.monotonic() - began < 2


def test_the_second_goes_on_when_the_first_ends(tmp_path: Path) -> None:
    for arguments in ([], ["remove"]):
        file = tmp_path / "-".join(["lock", *arguments])
        with holder(file, *arguments) as process:
            waiting = subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdin=subprocess.PIPE, text=True)
            time.sleep(0.5)
            assert waiting.poll() is None
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(10) == 0
            waiting.communicate("", timeout=10)
            assert waiting.returncode == 0
            assert file.exists(), "the lock of the one that waited is the file that has the name"


def test_a_removed_lock_is_gone_after_the_block(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", "a", remove=True):
        assert (tmp_path / "lock").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_only_a_regular_file_is_opened(tmp_path: Path, kind: str) -> None:
    target, file = tmp_path / "precious", tmp_path / "lock"
    target.write_text("precious")
    if kind == "link":
        file.symlink_to(target)
    elif kind == "folder":
        file.mkdir()
    else:
        os.mkfifo(file)
    with pytest.raises(UserError, match="the lock file"), locked(file, "a", 1.0):
        pytest.fail("opened")
    assert target.read_text() == "precious"


def test_programs_that_the_holder_starts_do_not_keep_the_lock(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", "a"):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    with locked(tmp_path / "lock", "b", 1.0):
        child.kill()
    child.wait()


def test_a_volume_without_locks_is_used_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*arguments: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path / "lock", "a", 1.0):
        pass


def test_a_lock_file_of_another_user_is_locked_without_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lock"
    file.write_text("theirs")
    opened = os.open

    def read_only(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if path == file and flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *arguments, **options)

    monkeypatch.setattr(locks.os, "open", read_only)
    with locked(file, "a", 1.0), pytest.raises(UserError, match="by theirs"), locked(file, "b", 0.0):
        pytest.fail("both hold it")
    assert file.read_text() == "theirs"


def test_what_a_lock_file_says_is_shown_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.write(descriptor, b"\xff\x1b[31m\nerror: delete everything\n" * 1000)
    with pytest.raises(UserError) as refused, locked(file, "b", 0.0):
        pytest.fail("both hold it")
    os.close(descriptor)
    assert "\n" not in str(refused.value) and "\x1b" not in str(refused.value) and len(str(refused.value)) < 600
