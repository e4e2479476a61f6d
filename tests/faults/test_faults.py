"""A tenth of the table of faults, the same each time; slow ones in `make test-slow`. All of it: `make test-faults`."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.table import CLUSTER, FAULTS, Fault, World, cases, chance_of

pytestmark = pytest.mark.long

SEED = "a tenth"
CLUSTER_TESTS = Path(__file__).parents[1] / "cluster"


def tenth() -> list[tuple[Fault, str, Callable[[World, random.Random], None]]]:
    """At least one case of each fault, without the slowest one."""
    chance = random.Random(SEED)
    everything = [case for case in cases() if case[1] != "10 pipelines"]
    chosen = [chance.choice([case for case in everything if case[0] is fault]) for fault in FAULTS]
    others = [case for case in everything if case not in chosen]
    return chosen + chance.sample(others, max(0, len(everything) // 10 - len(chosen)))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{case[0].name}: {case[1]}", marks=[pytest.mark.slow] if case[0].slow else [])
        for case in tenth()
    ],
)
def test_a_fault_changes_no_result(world: World, case: tuple[Fault, str, Callable[..., None]]) -> None:
    fault, name, work = case
    _ = world.undisturbed
    work(world, chance_of(SEED, fault, name))


def test_the_faults_of_a_cluster_have_their_tests() -> None:
    for _, _, file, words in CLUSTER:
        assert words in (CLUSTER_TESTS / file).read_text(encoding="utf-8"), f"{file}: no test about {words}"
