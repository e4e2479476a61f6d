"""The comparison of XLA graphs for pytest -m neuron (tests/neuron/graphs.py), on small dumps."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuron.graphs import graph_set

GRAPH = """\
HloModule SyncTensorsGraph.12, entry_computation_layout={(f32[2,4]{1,0}, f32[])->(f32[2,4]{1,0})}

%region_0.7 (Arg_0.8: f32[], Arg_1.9: f32[]) -> f32[] {
  %Arg_0.8 = f32[] parameter(0)
  %Arg_1.9 = f32[] parameter(1)
  ROOT %add.10 = f32[] add(f32[] %Arg_0.8, f32[] %Arg_1.9)
}

ENTRY %SyncTensorsGraph.12 (p0.1: f32[2,4], p1.2: f32[]) -> (f32[2,4]) {
  %p0.1 = f32[2,4]{1,0} parameter(0), metadata={op_type="xla__device_data" op_name="a \\"{0}\\"" source_line=7}
  %constant.3 = f32[] constant(0.5)
  %broadcast.4 = f32[2,4]{1,0} broadcast(f32[] %constant.3), dimensions={}
  %multiply.5 = f32[2,4]{1,0} multiply(f32[2,4]{1,0} %p0.1, f32[2,4]{1,0} %broadcast.4)
  ROOT %tuple.11 = (f32[2,4]{1,0}) tuple(f32[2,4]{1,0} %multiply.5)
}
"""
AGAIN = (
    GRAPH.replace("Graph.12", "Graph.345")
    .replace(".10 ", ".410 ")
    .replace("constant.3", "constant.88")
    .replace("multiply.5", "multiply.91")
    .replace("source_line=7", "source_line=8")
    .replace("region_0.7", "region_0.66")
)


def dumped(folder: Path, *texts: str) -> set[str]:
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"module_{number:04}.SyncTensorsGraph.{number}.before_optimizations.txt").write_text(text)
        (folder / f"module_{number:04}.SyncTensorsGraph.{number}.cpu_after_optimizations.txt").write_text(f"{number}")
    return graph_set(folder)


def test_the_same_graph_is_equal_in_every_dump(tmp_path: Path) -> None:
    assert AGAIN != GRAPH
    assert dumped(tmp_path / "compile", GRAPH, AGAIN) == dumped(tmp_path / "train", AGAIN)
    assert len(dumped(tmp_path / "one", GRAPH, AGAIN)) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[2,4]", "[2,8]"),
        ("constant(0.5)", "constant(0.25)"),
        ("multiply(", "add("),
        ("f32", "bf16"),
        ("dimensions={}", "dimensions={0}"),
    ],
)
def test_different_graphs_differ(tmp_path: Path, old: str, new: str) -> None:
    assert GRAPH.count(old)
    missing = dumped(tmp_path / "train", GRAPH.replace(old, new)) - dumped(tmp_path / "compile", GRAPH)
    assert len(missing) == 1


def test_a_dump_without_graphs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="XLA_FLAGS"):
        graph_set(tmp_path)
