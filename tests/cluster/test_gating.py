"""Each stage waits for the one before it, and a stage that fails ends the release at once."""

from __future__ import annotations

from cluster.space import Space, is_stage, stand_in, succeeded

ORDER = ["preflight", "tokenize", "compile", "compile-gate", "train", "train-gate", "consolidate", "merge", "evaluate"]


def test_no_pod_of_a_stage_exists_before_the_stage_before_has_succeeded(space: Space, helm: int) -> None:
    """The pods of a PyTorchJob are its gate's to release; so each is held to the last stage that is a Job."""
    space.release(helm).install(stand_in(tokenize="sleep 2", train="sleep 2"))
    first_pod = {stage: space.history.first(lambda o: o["kind"] == "Pod" and is_stage(o, stage)) for stage in ORDER}
    ended = {stage: space.history.first(lambda o: o["kind"] != "Pod" and is_stage(o, stage) and succeeded(o)) for stage in ORDER}
    assert None not in first_pod.values() and None not in ended.values()
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
        assert first_pod[stage] >= ended[before], f"a pod of {stage} was there before {before} had succeeded"
