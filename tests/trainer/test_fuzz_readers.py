"""Every reader of files, with damaged ones: it reads them, or raises a UserError, in bounded memory and time.

``make test`` runs a tenth of the cases. The readers run in a fork, because those in C and Rust can end their process.
To repeat a case: its reader and its number are in the message.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import damage
from genvalues.common.errors import Unavailable, UserError
from trainer.conftest import CHAT_TEMPLATE, Run

SEED = 20261129
# Of CPU, and by the clock where others use the cores. The limit of a chat template, 30 s, is lowered to 1.
MOST_SECONDS, MOST_SECONDS_BY_THE_CLOCK = 10.0, 120
MOST_LINES, MOST_CHARACTERS = 30, 2000  # of a message: a line for each of the first bad rows
MOST_BYTES = 3 << 30  # beyond what the process has; a chat template may take 2 GiB


@dataclass(frozen=True)
class Reader:
    """A reader in ``cases`` cases. ``files``: the patterns of the files to damage in the folder that ``make`` fills."""

    cases: int
    make: Callable[[Run, Path], None]
    files: tuple[str, ...]
    damage: Callable[[bytes, random.Random], bytes]
    read: Callable[[Run, Path], None]


# --- what the readers read


def model_and_adapter(run: Run, folder: Path) -> None:
    shutil.copytree(model_of(run), folder / "base")
    shutil.copytree(run.paths.adapter, folder / "adapter")


def sharded_model(run: Run, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    model_and_adapter(run, folder)
    whole = folder / "base" / "model.safetensors"
    tensors = load_file(whole)
    weight_map = {name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == shard}
        save_file(part, folder / "base" / shard, metadata={"format": "pt"})
    whole.unlink()
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def checkpoint(run: Run, folder: Path) -> None:
    shutil.copytree(run.workspace / run.manifest("train")["facts"]["checkpoint"], folder / "step-000006")


def model_of(run: Run) -> Path:
    return run.workspace / str(run.manifest("tokenize")["facts"]["model"])


def model(run: Run, folder: Path) -> None:
    shutil.copytree(model_of(run), folder / "base")


def gguf(run: Run, folder: Path) -> None:
    from trainer.test_snapshot import write_gguf

    write_gguf(folder / "model.gguf", True)


ROWS: list[dict[str, Any]] = [
    {"text": f"row {number} of many", "messages": [{"role": "user", "content": "a"}], "n": number, "x": [1.5, None]}
    for number in range(20)
]


def rows(run: Run, folder: Path) -> None:
    """The same rows in every format."""
    import csv

    import pyarrow
    import pyarrow.parquet

    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "rows.jsonl").write_text(lines)
    (folder / "rows.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    written = io.StringIO()
    table = csv.DictWriter(written, ["text", "n"], extrasaction="ignore")
    table.writeheader()
    table.writerows([{**row, "text": f'a "quoted", text\nof {row["n"]}'} for row in ROWS])
    (folder / "rows.csv").write_text(written.getvalue())
    (folder / "rows.txt").write_text("".join(f"{row['text']}\n" for row in ROWS))
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "rows.jsonl.zst").write_bytes(pyarrow.compress(lines.encode(), codec="zstd", asbytes=True))
    for name, options in {"a": {}, "b": {"compression": "none", "use_dictionary": False}}.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / f"{name}.parquet", **options)


def conversations(run: Run, folder: Path) -> None:
    """Rows of every format, with tools and calls of them."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    chat: list[dict[str, Any]] = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "u"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1", "name": "f"},
        {"from": "gpt", "value": "a", "weight": 1},
    ]
    row = {"messages": chat, "tools": json.dumps([call]), "system": "s", "text": "t", "prompt": "p", "completion": "c"}
    row |= {"instruction": "i", "input": "", "output": "o", "history": [["a", "b"]]}
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(3)))


def template(run: Run, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def whole_workspace(run: Run, folder: Path) -> None:
    run.copy(folder)


# --- the readers, as stages and tools call them


def merge(run: Run, folder: Path) -> None:
    from llama_lora.stages.merge import merge_adapter

    merge_adapter(folder / "base", folder / "adapter", folder / "merged")


def consolidate(run: Run, folder: Path) -> None:
    from llama_lora.stages.consolidate import consolidate_checkpoint

    consolidate_checkpoint(folder / "step-000006", folder / "adapter")


def tokenize_model(run: Run, folder: Path) -> None:
    """What tokenize reads of a model, and evaluate of a merged one."""
    from llama_lora import evaluation
    from llama_lora.backends.native import rules
    from llama_lora.data import row_checks
    from llama_lora.data.resolve import Source
    from llama_lora.data.snapshot import take_snapshot
    from llama_lora.stages.tokenize import load_tokenizer
    from llama_lora.streaming import StreamedModel

    config = run.load()
    model = config.model.model_copy(update={"path": str(folder / "base")})
    snapshot = take_snapshot(model, Source(str(folder / "base"), "0" * 40), folder / "models")
    if errors := rules.check(config, snapshot):
        raise errors[0]
    tokenizer = load_tokenizer(snapshot)
    row_checks.stop_tokens(snapshot, tokenizer)
    evaluation.load_model(snapshot)
    StreamedModel(snapshot)


def tokenize_gguf(run: Run, folder: Path) -> None:
    from llama_lora.data.resolve import Source
    from llama_lora.data.snapshot import take_snapshot

    model = run.load().model.model_copy(update={"path": str(folder / "model.gguf")})
    take_snapshot(model, Source("model.gguf", "0" * 40), folder / "models")


def read_dataset(run: Run, folder: Path) -> None:
    from llama_lora.data.file_formats import read_file
    from llama_lora.data.rows import BadRows

    (file,) = folder.iterdir()
    bad_rows = BadRows()
    for _ in read_file(file, bad_rows, columns=("text", "messages")):
        pass
    bad_rows.raise_errors()


def render_rows(run: Run, folder: Path) -> None:
    """As tokenize renders rows that can be read, in every format."""
    from llama_lora.data.chat_template import limits
    from llama_lora.data.columns import Dropped
    from llama_lora.data.file_formats import read_file
    from llama_lora.data.rendering import Renderer
    from llama_lora.data.rows import BadRows, RowError
    from trainer.conftest import byte_tokenizer

    bad_rows = BadRows()
    renderers = [Renderer(byte_tokenizer(), name, {}) for name in ("chat", "instruction", "prompt-completion", "text")]
    for row in read_file(folder / "rows.jsonl", bad_rows, columns=("messages",)):
        for renderer in renderers:
            try:
                with limits(row.place):
                    renderer.render(row)
            except (Dropped, RowError):
                pass
    bad_rows.raise_errors()


def render_template(run: Run, folder: Path) -> None:
    from llama_lora.data.chat_template import ChatTemplate, limits
    from llama_lora.data.columns import Dropped

    source = (folder / "chat_template.jinja").read_bytes().decode("utf-8", "replace")
    messages: list[Any] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    try:
        with limits("row 1"):
            chat.render(messages, [], prompt=False, place="row 1")
    except Dropped:
        pass


def read_records(run: Run, folder: Path) -> None:
    """What commands and stages read of a run: manifests, sources, progress, costs."""
    from genvalues.cluster.progress import describe_checkpoint, describe_progress, read_progress
    from llama_lora import stage
    from llama_lora.runlog import read_metrics

    copy = Run(folder, run.config)
    config, paths = copy.load(), copy.paths
    describe_progress(read_progress(paths.progress))
    describe_checkpoint(read_progress(paths.progress))
    read_metrics(next(paths.run.glob("checkpoints/*/metrics.jsonl")))
    for name in ("tokenize", "train", "merge", "evaluate"):
        each = stage.Stage(name, config, paths)
        each.is_done()
        try:
            each.check_upstream()
            stage.verify_outputs(name, config, paths)
        except UserError:
            pass


READERS: dict[str, Reader] = {
    "safetensors": Reader(160, model_and_adapter, ("base/model.safetensors",), damage.damaged_safetensors, merge),
    "index": Reader(150, sharded_model, ("base/*.index.json",), damage.damaged_json, merge),
    "adapter weights": Reader(170, model_and_adapter, ("adapter/*.safetensors",), damage.damaged_safetensors, merge),
    "adapter config": Reader(150, model_and_adapter, ("adapter/*.json",), damage.damaged_json, merge),
    "checkpoint": Reader(210, checkpoint, ("*/*.json",), damage.damaged_json, consolidate),
    "checkpoint part": Reader(80, checkpoint, ("*/*.safetensors",), damage.damaged_safetensors, consolidate),
    "config": Reader(
        180, model, ("base/config.json", "base/generation_config.json"), damage.damaged_json, tokenize_model
    ),
    "tokenizer": Reader(60, model, ("base/tokenizer*.json",), damage.damaged_json, tokenize_model),
    "gguf": Reader(40, gguf, ("model.gguf",), damage.damaged, tokenize_gguf),
    "Parquet": Reader(200, rows, ("*.parquet",), damage.damaged, read_dataset),
    "JSON lines": Reader(120, rows, ("rows.jsonl",), damage.damaged_lines, read_dataset),
    "JSON": Reader(60, rows, ("rows.json",), damage.damaged_json, read_dataset),
    "CSV": Reader(80, rows, ("rows.csv", "rows.txt"), damage.damaged_text, read_dataset),
    "compressed": Reader(60, rows, ("rows.jsonl.gz", "rows.jsonl.zst"), damage.damaged, read_dataset),
    "messages": Reader(100, conversations, ("rows.jsonl",), damage.damaged_lines, render_rows),
    "template": Reader(80, template, ("chat_template.jinja",), damage.damaged_template, render_template),
    "manifests": Reader(
        100,
        whole_workspace,
        ("workspace/runs/run/stages/*.json", "workspace/runs/run/*.json", "workspace/runs/run/checkpoints/*/*.jsonl"),
        damage.damaged_json,
        read_records,
    ),
}


def test_there_are_two_thousand_cases() -> None:
    assert sum(reader.cases for reader in READERS.values()) == 2000


@pytest.fixture(scope="module")
def fuzzed_run(whole_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return whole_run.copy(tmp_path_factory.mktemp("fuzzed"))


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused(
    name: str, fuzzed_run: Run, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    reader = READERS[name]
    count = reader.cases if pytestconfig.getoption("all") else max(2, reader.cases // 10)
    original = tmp_path / "original"
    original.mkdir()
    reader.make(fuzzed_run, original)
    problems = in_fork(lambda told: run_cases(name, fuzzed_run, original, tmp_path, count, told), count)
    assert not problems, f"{len(problems)} of {count} cases:\n" + "\n".join(problems[:40])


def in_fork(work: Callable[[Callable[[str], None]], None], count: int) -> list[str]:
    """Run the cases in a fork, which tells its problems over a pipe. How it ends, if not well, is one of them."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        status = 1
        try:
            with os.fdopen(writing, "w", buffering=1, errors="backslashreplace") as pipe:
                work(lambda line: print(line, file=pipe, flush=True))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines = pipe.read().splitlines()
    _, status = os.waitpid(pid, 0)
    problems = [line for line in lines if not line.startswith("case ")]
    if status:
        last = next((line for line in reversed(lines) if line.startswith("case ")), "no case")
        problems.append(f"{last}: the process ended with {os.waitstatus_to_exitcode(status)}")
    return problems


def run_cases(name: str, run: Run, original: Path, tmp_path: Path, count: int, told: Callable[[str], None]) -> None:
    import warnings

    from llama_lora import limits

    limits.SECONDS = 1.0
    warnings.simplefilter("ignore")
    limit_memory()
    reader = READERS[name]
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, time_is_up)
    for number in range(count):
        told(f"case {number}")
        folder = tmp_path / "case"
        chance = random.Random(f"{SEED} {name} {number}")
        what = prepare(reader, original, folder, chance)
        before = set(folder.rglob("*"))
        signal.alarm(MOST_SECONDS_BY_THE_CLOCK)
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
        began = time.process_time()
        try:
            with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
                reader.read(run, folder)
        except (UserError, Unavailable) as error:
            if isinstance(error, Unavailable):
                told(f"{number} {what}: Unavailable: {error}")
            lines = str(error).splitlines()
            if not lines or len(lines) > MOST_LINES or max(map(len, lines)) > MOST_CHARACTERS:
                told(f"{number} {what}: a message of {len(lines)} lines with {len(str(error))} characters")
            left = [path for path in set(folder.rglob("*")) - before if path.name not in ("models",)]
            if left and reader.read in (merge, consolidate):
                told(f"{number} {what}: refused, but left {left[0]}")
        except BaseException as error:
            own = [frame for frame in traceback.extract_tb(error.__traceback__) if "llama_lora" in frame.filename]
            at = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
            text = " ".join(str(error).split())[:150]
            told(f"{number} {what}: {type(error).__name__} at {at}: {text}")
        finally:
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
        if time.process_time() - began > MOST_SECONDS:
            told(f"{number} {what}: took {time.process_time() - began:.0f} s")


def prepare(reader: Reader, original: Path, folder: Path, chance: random.Random) -> str:
    """Make the folder of a case, with one file of it damaged; a dataset's folder has that file alone."""
    shutil.rmtree(folder, ignore_errors=True)
    files = sorted(file for pattern in reader.files for file in original.glob(pattern))
    file = chance.choice(files)
    name = file.relative_to(original)
    if reader.read is read_dataset:
        folder.mkdir()
    else:
        shutil.copytree(original, folder)
    (folder / name).write_bytes(reader.damage(file.read_bytes(), chance))
    return str(name)


def limit_memory() -> None:
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MOST_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


class TimeIsUp(BaseException):
    """No code under test catches it as an Exception."""


def time_is_up(number: int, frame: Any) -> Iterator[None]:
    raise TimeIsUp(f"more than {MOST_SECONDS} s of CPU, or {MOST_SECONDS_BY_THE_CLOCK} s")
