"""`genvalues plan --trace`, with a STAND-IN for the trainer's tracer: a script that prints what the real one prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from genvalues.accelerators.architectures import known
from genvalues.commands.plan import plan as command
from genvalues.common.errors import UserError
from genvalues.inputs.input_options import Sources
from genvalues.ops import trace
from genvalues.ops.live_plan import planned
from genvalues.planner import report
from genvalues.planner.trace import PARTS, InvalidTrace, parse
from genvalues.settings.run import RunConfig

ROOT = Path(__file__).parents[3]
TRN2 = ROOT / "values/trn2.yaml"
GIB = 1 << 30
TRACED = {
    "world": 64,
    "bytes": dict.fromkeys(PARTS, GIB),
    "operators": ["aten.mm.default", "aten.silu.default"],
    "graphs": 6,
    "seconds": 31.5,
    "problems": [],
}
# Not the tracer: it copies the run that it is given, and prints the answer beside it.
STAND_IN = """
import json, pathlib, shutil, sys
option, config = sys.argv[1:]
assert option == "--config"
here = pathlib.Path(__file__).parent
shutil.copy(config, here / "run.json")
model = json.loads(pathlib.Path(config).read_text())["model"]["path"]
shutil.copy(pathlib.Path(model, "config.json"), here / "config.json")
print("tracing", file=sys.stderr)
print("a line of a library")
print((here / "answer.json").read_text())
sys.exit(int((here / "status").read_text()))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the stand-in: its answer, and what it was given."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(trace, "tracer_command", lambda config: [sys.executable, str(script), "--config", str(config)])
    answer(tmp_path)
    return tmp_path


def answer(folder: Path, status: int = 0, **changes: Any) -> None:
    (folder / "answer.json").write_text(json.dumps({**TRACED, **changes}))
    (folder / "status").write_text(str(status))


def traced(*sets: str, file: Path = TRN2) -> Any:
    return planned(Sources((file,), sets), offline=True, trace=True)


def test_the_tracer_gets_exactly_this_run(stand_in: Path) -> None:
    found = traced("lora.r=8", "training.globalBatchSize=128", "chartValues.training.seed=7")
    given = RunConfig.model_validate(json.loads((stand_in / "run.json").read_text()))
    layout = found.layout
    assert (given.backend, given.device) == ("native", "neuron")
    assert (given.parallelism.tensor_parallel_size, given.parallelism.shard_size) == (1, layout.shard_size)
    assert given.parallelism.data_parallel_size == layout.data_parallel == 64
    assert (given.training.gradient_accumulation_steps, given.lora.r) == (2, 8)
    assert given.training.seed == 7, "chartValues are part of the run"
    model = json.loads((stand_in / "config.json").read_text())
    a = known("meta-llama/Meta-Llama-3.1-8B")
    assert a is not None
    assert (model["model_type"], model["num_hidden_layers"], model["hidden_size"]) == ("llama", a.layers, a.hidden)
    assert not Path(given.model.path).exists(), "the folder was temporary"


def test_computed_and_traced_bytes_stand_side_by_side(stand_in: Path) -> None:
    found = traced()
    text = report.as_text(found)
    assert found.memory is not None
    _, _, table = text.partition("Memory per core, computed and traced")
    lines = {line.split()[0]: line.split() for line in table.splitlines()[1 : 1 + len(PARTS)]}
    assert set(lines) == set(PARTS)
    peak = found.memory.peak / GIB
    assert lines["peak"][1:3] == [f"{peak:.1f}", "1.0"]
    assert lines["peak"][3] == f"{peak - 1:+.1%}"
    assert "6 to compile" in text and "aten.mm.default, aten.silu.default" in text and "one of 64" in text
    assert json.loads(json.dumps(report.as_json(found)))["trace"] == TRACED
    assert report.as_json(planned(Sources((TRN2,)), offline=True))["trace"] is None


def test_what_the_trace_finds_wrong_is_printed_after_the_plan_with_status_2(stand_in: Path) -> None:
    answer(stand_in, problems=["aten.nonzero.default has a data-dependent shape"])
    done = CliRunner().invoke(command, [str(TRN2), "--offline", "--trace"])
    assert "problem" in done.output and "Memory per core, computed and traced" in done.output
    assert isinstance(done.exception, UserError)
    assert "--trace: aten.nonzero.default has a data-dependent shape" in str(done.exception)


def test_a_tracer_that_fails_is_not_taken_for_a_trace(stand_in: Path) -> None:
    answer(stand_in, status=2)
    with pytest.raises(UserError, match="cannot be traced"):
        traced()
    answer(stand_in, status=1)
    with pytest.raises(trace.TraceFailed, match="status 1"):
        traced()
    (stand_in / "answer.json").write_text("Killed")
    (stand_in / "status").write_text("0")
    with pytest.raises(trace.TraceFailed, match="invalid"):
        traced()


@pytest.mark.parametrize("output", ["", "{}", "[]", "null", json.dumps({**TRACED, "bytes": {"base": 1}})])
def test_output_that_is_not_a_trace_is_refused(output: str) -> None:
    with pytest.raises(InvalidTrace):
        parse(output)


@pytest.mark.parametrize(
    ("sets", "file", "said"),
    [
        (("backend=xla",), "trn2", "backend xla"),
        ((), "trn1", "backend xla"),
        ((), "cpu", "on cpu"),
        (("model.path=/workspace/model",), "trn2", "architecture of /workspace/model"),
    ],
)
def test_runs_that_cannot_be_traced_are_refused_at_the_option(
    stand_in: Path, sets: tuple[str, ...], file: str, said: str
) -> None:
    with pytest.raises(UserError) as told:
        traced(*sets, file=ROOT / f"values/{file}.yaml")
    assert told.value.where == "--trace" and said in told.value.what and told.value.fix
    assert not (stand_in / "run.json").exists()


def test_an_environment_without_the_trainers_libraries_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "LIBRARIES", ("json", "no_such_library"))
    with pytest.raises(UserError) as told:
        traced()
    assert "no_such_library" in told.value.what and "json" not in told.value.what
    assert "trainer" in told.value.fix and "image" in told.value.fix


def test_the_command_is_the_trainers_module_with_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "LIBRARIES", ())
    made = trace.tracer_command(Path("/tmp/run.yaml"))
    assert made == [sys.executable, "-m", "llama_lora.backends.native.trace", "--config", "/tmp/run.yaml"]
