"""`make test-cluster`: test the chart on a real Kubernetes.

Starts a node on this machine (needs root, Debian's packages and Go), runs tests/cluster on it and stops it, also after
a failure. Arguments are passed to pytest. With --all alone, tests marked slow run too, most tests with both versions of
Helm and both APIs, and some with older operators.

CLUSTER=current    use the cluster of $KUBECONFIG instead: one with the training operator, whose nodes can pull the
                   images $TRAINER_IMAGE and $STAND_IN_IMAGE
CLUSTER=keep       leave the node running, and print how to use it
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).parents[1]))

from pytest import ExitCode as pytest_status

from cluster.local import binaries, images, node, operators
from genvalues.common.errors import UserError, user_errors_end_with_status_2
from genvalues.common.process import processes
from helm_binaries import helm_binary

HERE = Path(__file__).parent
STOPPED_BY = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
AT_MOST = 2400  # seconds for each part of the tests
# Marker expressions of the parts, which run one after another, and the number of tests of each that run at once: tests
# of the chart; one test for each operator that is replaced; tests that drain the node or stop its API server.
IN_PARALLEL = "not node and not operator"
PARTS = {IN_PARALLEL: 5, "operator": 2, "node": 0}


@user_errors_end_with_status_2
def main() -> int:
    wish = os.environ.get("CLUSTER", "")
    if wish == "current":
        if not os.environ.get("KUBECONFIG"):
            raise UserError("CLUSTER=current, and KUBECONFIG is not set", fix="export KUBECONFIG=... of that cluster")
        binaries.build_all(["helm3", "helmfile"])
        return run_tests(["-m", IN_PARALLEL], sys.argv[1:])
    if wish not in {"", "keep"}:
        raise UserError(f"CLUSTER={wish}", fix="Leave it out, or use CLUSTER=current or CLUSTER=keep")
    with own_node(keep=wish == "keep"):
        os.environ["KUBECONFIG"] = str(node.KUBECONFIG)
        if wish == "keep":
            print(f"export KUBECONFIG={node.KUBECONFIG} CLUSTER=current   # stop it: python {__file__} stop")
            return 0
        return run_tests([], sys.argv[1:])


@contextmanager
def own_node(keep: bool) -> Iterator[None]:
    """Start a node that has the images, and stop it at the end unless it is to be kept."""
    for number in STOPPED_BY:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    node.check_this_machine()
    lock = take_lock()
    began = time.monotonic()
    try:
        with executor(2) as beside:  # one downloads, the other compiles, and the node starts in parallel
            bases = beside.submit(images.make_bases)
            binaries.build_all(binaries.OF_THE_NODE)
            others = beside.submit(binaries.build_all)
            node.start()
            bases.result()
            images.load_trainers()  # gigabytes: beside tests, this delays their pods by more than they allow
            others.result()
        images.load_managers()
        operators.install_all()
        node.pretend_to_be_trainium()
        print(f"the node is ready after {time.monotonic() - began:.0f} s", flush=True)
        yield
    except BaseException:
        keep = False
        raise
    finally:
        for number in STOPPED_BY:  # a second signal must not interrupt the cleanup
            signal.signal(number, signal.SIG_IGN)
        if not keep:
            node.stop()
        print(f"after {time.monotonic() - began:.0f} s", flush=True)
        lock.close()


@contextmanager
def executor(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads whose builds and downloads are stopped when the block fails, so that a stopped run does not wait."""
    with ThreadPoolExecutor(workers) as threads:
        try:
            yield threads
        except BaseException:
            node.end([pid for pid, parent in processes() if parent == os.getpid()], signal.SIGTERM)
            raise


def take_lock() -> IO[str]:
    """Take the lock of the node: two runs would stop each other's node. Raises UserError if another run has it."""
    binaries.CACHE.mkdir(parents=True, exist_ok=True)
    lock = (binaries.CACHE / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError("another make test-cluster is running on this machine", fix="Wait for it, or stop it") from None
    return lock


def run_tests(selection: list[str], arguments: list[str]) -> int:
    """Run the parts; with a selection or pytest's arguments, the selected tests one after another."""
    helm_binary(4)  # before several processes unpack it at once
    pytest = [sys.executable, "-m", "pytest", str(HERE), "-v", "--durations=0", "--durations-min=1"]
    if selection or arguments not in ([], ["--all"]):
        return run_pytest([*pytest, *selection, *arguments])
    pytest += arguments
    parts = [[*pytest, "-m", marks, "-n", str(at_once), "--no-loadscope-reorder"] for marks, at_once in PARTS.items()]
    parts[0] += ["--cache-clear"]
    statuses = [run_pytest(part) for part in parts]
    if max(statuses) == pytest_status.TESTS_FAILED:  # and no part was interrupted
        print("the tests that failed run once more, each alone; those that pass now are unstable", flush=True)
        return run_pytest([*pytest, "--last-failed", "--last-failed-no-failures=none"])
    return 1 if any(statuses) else 0


def run_pytest(command: list[str]) -> int:
    """Run pytest. It ends when this process does, with time for the tests to clean up."""
    process = subprocess.Popen(command)
    try:
        return process.wait(AT_MOST)
    except subprocess.TimeoutExpired:
        print(f"the tests have not ended after {AT_MOST} s", flush=True)
        return pytest_status.INTERRUPTED
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


if __name__ == "__main__":
    if sys.argv[1:] == ["stop"]:
        node.stop()
    else:
        sys.exit(main())
