"""Each stage waits for the previous one."""

from __future__ import annotations

from cluster.space import Space, stages_in_order, stand_in


def test_no_pod_of_a_stage_exists_before_the_previous_stage_has_succeeded(space: Space, helm: int) -> None:
    space.release(helm).install(stand_in(tokenize="sleep 2", compile="sleep 2", train="sleep 2"))
    stages_in_order(space.history)
