"""Settings for every test process, options of the suite, and the line that says what ran."""

from __future__ import annotations

import functools
import gc
import os
from collections import Counter

import botocore.session
import pytest
import yaml
from hypothesis import HealthCheck, settings

# One thread per process, and none that spins while it waits: several workers share the cores. Set before torch is
# imported, which reads it once; the processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["GOGC"] = "400"  # helm renders a chart in 15 % less time
os.fsync = lambda fd: None  # nothing waits for the disk
# Read botocore's description of a service once: it takes up to half a second of CPU, and nearly every client anew.
botocore.session.create_loader = functools.cache(botocore.session.create_loader)
yaml.safe_load = functools.partial(
    yaml.load, Loader=yaml.CSafeLoader
)  # ten times as fast; the product has loaders of its own
os.environ.pop("KUBERNETES_SERVICE_HOST", None)  # where CI runs in a pod: commands behave otherwise in one of the chart

FUZZ_CASES, ALL_FUZZ_CASES = 200, 10_000
ROUND_TRIPS, ALL_ROUND_TRIPS = 10, 500
EXAMPLES, ALL_EXAMPLES = 30, 200  # of each of hypothesis' tests


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all", action="store_true", help="also tests marked slow or repeat, and every fuzz case (make test-all)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before hypothesis' tests are imported, whose settings start from this profile."""
    settings.register_profile(
        "llama-lora",
        max_examples=ALL_EXAMPLES if config.getoption("all") else EXAMPLES,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],  # slow: on a busy machine
    )
    settings.load_profile("llama-lora")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked slow or repeat, and of a whole run those marked long, unless --all asks for them."""
    if config.getoption("all"):
        return
    left_out = ["slow", "repeat", *(["long"] if is_whole(config) and not config.option.markexpr else [])]
    rest = [item for item in items if any(item.get_closest_marker(mark) for mark in left_out)]
    items[:] = [item for item in items if item not in set(rest)]
    config.hook.pytest_deselected(items=rest)


def is_whole(config: pytest.Config) -> bool:
    """Whether no file was named on the command line, and the run is not a repetition of failed tests."""
    return config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.getoption("lf")


@pytest.fixture(scope="session")
def fuzz_cases(pytestconfig: pytest.Config) -> int:
    return ALL_FUZZ_CASES if pytestconfig.getoption("all") else FUZZ_CASES


@pytest.fixture(scope="session")
def round_trips(pytestconfig: pytest.Config) -> int:
    return ALL_ROUND_TRIPS if pytestconfig.getoption("all") else ROUND_TRIPS


def pytest_collection_finish() -> None:
    """Leave what is imported to itself: no garbage collection looks at it again, and no fork copies it for that."""
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Of a whole run, say what ran and what did not, in the line before pytest's own last line."""
    if not is_whole(config) or config.option.markexpr:
        return
    reports = terminalreporter.stats
    said = [f"{len(reports[kind]):,} {kind}" for kind in ("passed", "failed", "error") if reports.get(kind)]
    skips = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports.get("skipped", []))
    said += [f"{count} skipped ({reason})" for reason, count in skips.items()]
    not_run = ["make test-faults", "make test-xla", "make test-cluster", "make demo", "make bench"]
    if not config.getoption("all"):
        left_out = f"{ALL_FUZZ_CASES - FUZZ_CASES:,} fuzz cases, {ALL_ROUND_TRIPS - ROUND_TRIPS} round trips"
        repeats = f"tests marked repeat, {left_out} (make test-all)"
        not_run = ["tests marked long (make test-long) or slow (make test-slow)", repeats, *not_run]
    terminalreporter.write_line(f"{', '.join(said)}. Not run: {', '.join(not_run)}.")
