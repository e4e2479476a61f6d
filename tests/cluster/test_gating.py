"""Each stage waits for the one before it."""

from __future__ import annotations

from cluster.space import Space, is_stage, stand_in, succeeded


def first_pod(space: Space, stage: str) -> float | None:
    return space.history.first(lambda item: item["kind"] == "Pod" and is_stage(item, stage))


def end(space: Space, stage: str) -> float | None:
    return space.history.first(lambda item: item["kind"] != "Pod" and is_stage(item, stage) and succeeded(item))


def test_no_pod_of_a_stage_exists_before_the_stage_before_has_succeeded(space: Space, helm: int) -> None:
    """The pods of a PyTorchJob are its gate's to release; so each is held to the last stage that is a Job."""
    space.release(helm).install(stand_in(tokenize="sleep 2", train="sleep 2"))
    for stage, before in [
        ("tokenize", "preflight"),
        ("compile-gate", "tokenize"),
        ("compile", "tokenize"),
        ("train-gate", "compile-gate"),
        ("train", "compile-gate"),
        ("consolidate", "train-gate"),
        ("merge", "consolidate"),
        ("evaluate", "merge"),
    ]:
        made, ended = first_pod(space, stage), end(space, before)
        assert made is not None and ended is not None
        assert made >= ended, f"a pod of {stage} was there before {before} had succeeded"
