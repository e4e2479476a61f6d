"""A volume that is full, read-only or refuses a stage's writes: one line, nothing half-written, and after making room
the result that an undisturbed run has.

The volume is a file system in memory (tmpfs) where this process may mount one. Elsewhere, as in a container without
CAP_SYS_ADMIN, the limit of the size of a file stands in for a full one (ulimit -f), and the other cases are skipped.
"""

from __future__ import annotations

import ctypes
import functools
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from genvalues.common import files
from trainer.conftest import LLAMA_LORA, Run
from trainer.test_training import losses
from trainer.warm import WarmPopen

pytestmark = pytest.mark.long

STAGES = ("tokenize", "rehearse", "compile", "train", "consolidate", "merge", "evaluate")
LARGE = ("tokenize", "rehearse", "train", "merge")  # write files of more than 16 KiB
CAPSET_VERSION, RIGHTS_OF_ROOT = 0x20080522, (1, 2, 3)  # linux/capability.h: DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER


def stages(*often: str, among: tuple[str, ...] = STAGES) -> pytest.MarkDecorator:
    """The stages of a case; those that are not in ``often`` run with the slow tests."""
    cases = [pytest.param(stage, marks=[] if stage in often else pytest.mark.slow) for stage in among]
    return pytest.mark.parametrize("stage", cases)


@functools.cache
def can_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    if sys.platform != "linux" or os.getuid() != 0:
        return False
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False)
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        return done.returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="may not mount a tmpfs")


@contextmanager
def volume(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.fixture(scope="module")
def whole(whole_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run with every stage done, also rehearse."""
    run = whole_run.copy(tmp_path_factory.mktemp("whole-rehearsed"))
    run.config["backend"] = "native"
    run("rehearse")
    run.config["backend"] = whole_run.config["backend"]
    return run


def before(stage: str, whole: Run, folder: Path) -> Run:
    """A copy of the run in which the stage has not run yet."""
    run = whole.copy(folder)
    paths = run.paths
    run.paths.manifest(stage).unlink()
    for output in {
        "tokenize": [paths.models, paths.datasets],
        "train": [*paths.run.glob("checkpoints"), paths.progress],
        "consolidate": [paths.adapter],
        "merge": [paths.merged],
        "evaluate": [paths.evaluation, paths.report],
    }.get(stage, []):
        shutil.rmtree(output) if output.is_dir() else output.unlink()
    return run


def results(run: Run, stage: str) -> dict[str, Any]:
    """The outputs of a stage: digests; of a checkpoint the tensors, as safetensors orders its header at random."""
    from safetensors.numpy import load_file

    if stage == "train":
        parts = sorted(run.paths.run.glob("checkpoints/*/step-000006/*.safetensors"))
        return {
            f"{part.name} {name}": tensor.tobytes() for part in parts for name, tensor in load_file(part).items()
        } | {"losses": losses(run)}
    outputs = run.manifest(stage)["outputs"]
    return {name: output["sha256"] for name, output in outputs.items() if not name.endswith(".html")}  # has times


def half_written(run: Run) -> list[str]:
    """What a failed stage has left under a temporary name."""
    found = run.workspace.rglob(f"*{files.PARTIAL}*")
    return [str(path.relative_to(run.workspace)) for path in found]


def fails(run: Run, stage: str, preexec_fn: Callable[[], None] | None = None) -> tuple[int, list[str]]:
    """The status and the lines of a stage that fails; it must have no traceback and no manifest."""
    command = [stage, "--config", str(run.write_config()), "--workspace", str(run.workspace)]
    with WarmPopen(
        [LLAMA_LORA, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=preexec_fn
    ) as process:
        said, _ = process.communicate(timeout=120)
    assert "Traceback" not in said, said
    assert not run.paths.manifest(stage).exists(), said
    assert not half_written(run), said
    return process.returncode, said.splitlines()


def fill(folder: Path, leave: int) -> Path:
    """Fill a volume up to some bytes."""
    filler = folder / "filler"
    space = os.statvfs(folder)
    filler.write_bytes(b"\0" * max(0, space.f_bavail * space.f_frsize - leave))
    return filler


@contextmanager
def prepared_volume(stage: str, whole: Run, folder: Path, options: str = "size=64m") -> Iterator[Run]:
    """A run before the stage, whose workspace is a volume of its own."""
    run = before(stage, whole, folder)
    moved = folder / "moved"
    run.workspace.rename(moved)
    with volume(run.workspace, options):
        shutil.copytree(moved, run.workspace, dirs_exist_ok=True)
        yield run


# Nothing at all; not enough for the largest file of the stage. compile and evaluate write a few pages only.
LEFT = {"tokenize": (0, 64 << 10), "rehearse": (0, 64 << 10), "train": (0, 48 << 10), "merge": (0, 64 << 10)}
LEFT |= {"compile": (0,), "consolidate": (0, 8 << 10), "evaluate": (0, 4 << 10)}


@needs_mount
@stages("tokenize", "train", "consolidate", "merge", "evaluate")
def test_a_full_volume_is_one_line_and_after_making_room_the_result_is_the_same(
    whole: Run, tmp_path: Path, stage: str
) -> None:
    whole.config["backend"] = "native" if stage == "rehearse" else "cpu"
    with prepared_volume(stage, whole, tmp_path) as run:
        for left in LEFT[stage]:
            filler = fill(run.workspace, left)
            status, lines = fails(run, stage)
            assert status == 75, lines
            assert "No space left on device" in lines[-1] and " are free there. " in lines[-1], lines
            assert str(run.workspace) in lines[-1] and "storage.size" in lines[-1]
            filler.unlink()
        run(stage)
        assert results(run, stage) == results(whole, stage)


@needs_mount
@stages("merge")
def test_a_volume_without_free_files_is_one_line(whole: Run, tmp_path: Path, stage: str) -> None:
    """It has bytes, but no inodes."""
    whole.config["backend"] = "native" if stage == "rehearse" else "cpu"
    with prepared_volume(stage, whole, tmp_path) as run:
        used = os.statvfs(run.workspace)
        remount(run.workspace, f"nr_inodes={used.f_files - used.f_ffree}")
        status, lines = fails(run, stage)
        assert status == 75, lines
        assert " 0 of " in lines[-1] and "files (inodes) are free" in lines[-1], lines
        remount(run.workspace, "nr_inodes=10000")
        run(stage)
        assert results(run, stage) == results(whole, stage)


@needs_mount
@stages("train")
def test_a_read_only_volume_is_one_line(whole: Run, tmp_path: Path, stage: str) -> None:
    whole.config["backend"] = "native" if stage == "rehearse" else "cpu"
    with prepared_volume(stage, whole, tmp_path) as run:
        remount(run.workspace, "ro")
        status, lines = fails(run, stage)
        assert status == 75, lines
        assert "Read-only file system" in lines[-1] and str(run.workspace) in lines[-1], lines
        assert "Mount the volume for writing" in lines[-1], lines
        remount(run.workspace, "rw")
        run(stage)
        assert results(run, stage) == results(whole, stage)


def give_up_roots_rights() -> None:
    """Have the modes of files and folders apply to this process, also where it is root's."""
    header = (ctypes.c_uint32 * 2)(CAPSET_VERSION, 0)
    data = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.capget(header, data)
    lost = sum(1 << right for right in RIGHTS_OF_ROOT)
    data[0] &= ~lost
    data[1] &= ~lost
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


# The folder that each stage writes to, relative to the run's.
WRITES_TO = {
    "tokenize": "../../models",
    "rehearse": ".",
    "compile": "stages",
    "train": "checkpoints",
    "consolidate": ".",
    "merge": ".",
    "evaluate": ".",
}


@pytest.mark.skipif(sys.platform != "linux", reason="needs capabilities")
@stages("tokenize", "train")
def test_a_folder_without_rights_is_one_line_and_status_2(whole: Run, tmp_path: Path, stage: str) -> None:
    whole.config["backend"] = "native" if stage == "rehearse" else "cpu"
    run = before(stage, whole, tmp_path)
    folder = (run.paths.run / WRITES_TO[stage]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o555)
    status, lines = fails(run, stage, preexec_fn=give_up_roots_rights)
    assert status == 2, lines
    assert "Permission denied" in lines[-1] and str(folder) in lines[-1], lines
    assert f"user {os.getuid()}" in lines[-1], lines
    folder.chmod(0o755)
    run(stage)
    assert results(run, stage) == results(whole, stage)


@stages("merge", among=LARGE)
def test_a_limit_of_the_size_of_a_file_is_one_line(whole: Run, tmp_path: Path, stage: str) -> None:
    """It needs no mount: what a quota does to a stage, everywhere."""
    whole.config["backend"] = "native" if stage == "rehearse" else "cpu"
    run = before(stage, whole, tmp_path)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, 16 << 10))

    status, lines = fails(run, stage, preexec_fn=limit)
    assert status == 75, lines
    assert "File too large" in lines[-1], lines
    run(stage)
    assert results(run, stage) == results(whole, stage)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["fingerprint", "tokenize"]], ids=" ".join)
def test_a_full_volume_to_which_stdout_is_redirected_is_one_line(whole: Run, command: list[str]) -> None:
    options = ["--config", str(whole.write_config()), "--workspace", str(whole.workspace)]
    arguments = [sys.executable, "-m", "llama_lora.cli", *command, *([] if "--help" in command else options)]
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 75 and line.startswith("stdout: cannot be written: No space left on device. Redirect it")
