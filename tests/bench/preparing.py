"""Preparing rows (reading, rendering, tokenizing, packing, writing) against TRL's preparation of the same rows.

The rows are Python's docstrings as {question, answer}, the tokenizer SmolLM2's. TRL prepares as a user of SFTTrainer
does: load_dataset, map, and what the trainer calls. Imports and loading the tokenizer are not part of the times.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.growing import growth_lines, linear
from bench.measure import (
    SMALL,
    TRL_024,
    TRL_NEWEST,
    XLA,
    Bench,
    Libraries,
    Measured,
    Sides,
    alternate,
    call,
    compared,
    inner,
    peak,
    serve,
)
from bench.table import Goal, Line

MAX_LENGTH = 2048
ROWS = 800 if SMALL else 4000
MANY = (100, 400, 1600) if SMALL else (7473, 29892, 119568)  # gsm8k's rows, 4 and 16 times of them
SHORT = 160  # characters of an answer where the rows are many, so that TRL takes no minutes


def ours(rows: str, tokenizer: str, processes: int, output: str) -> dict[str, float]:
    """Prepare rows with the stage tokenize."""
    from llama_lora import environment as environment  # sets the variables that transformers reads at import
    from llama_lora.config import RunConfig
    from llama_lora.data import tokenized_dataset
    from llama_lora.data.resolve import ResolvedSources, Source
    from llama_lora.stages.tokenize import load_tokenizer

    columns = {"instruction": "question", "output": "answer"}
    config = RunConfig.model_validate(
        {
            "name": "bench",
            "backend": "native",
            "model": {"path": tokenizer},
            "dataset": {"source": rows, "format": "instruction", "columns": columns, "evalFraction": 0},
            "training": {"maxSequenceLength": MAX_LENGTH},
            "evaluation": {"enabled": False},
            "parallelism": {"nodes": 1, "processesPerNode": 1, "tensorParallelSize": 1, "dataParallelSize": 1},
        }
    )
    loaded = load_tokenizer(Path(tokenizer))
    tokenized_dataset.available_cores = lambda: processes  # type: ignore[assignment]
    import datasets as datasets  # imported before the clock starts

    folder = Path(output)
    folder.mkdir()
    began = time.perf_counter()
    tokenized_dataset.tokenize_dataset(config, ResolvedSources(Source("", ""), Source("", "")), loaded, folder)
    seconds = time.perf_counter() - began
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return {"seconds": seconds, "rows": report["rows_read"] / seconds, "full": report["train"]["packing_efficiency"]}


def trl(rows: str, tokenizer: str, processes: int, output: str) -> dict[str, float]:
    """Prepare rows with TRL, with its default packing (best-fit-decreasing)."""
    from accelerate import PartialState
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    def conversation(row: dict[str, str]) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }

    disable_progress_bars()
    PartialState(cpu=True)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    several = processes if processes > 1 else None
    options: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": []}
    settings = SFTConfig(output, max_length=MAX_LENGTH, packing=True, dataset_num_proc=several, **options)
    trainer = SimpleNamespace(_is_vlm=False, _tokenizer=loaded, chat_template=None, completion_only_loss=True)
    began = time.perf_counter()
    read = load_dataset("json", data_files=rows, split="train", cache_dir=f"{output}/cache")
    read = read.map(conversation, remove_columns=read.column_names, num_proc=several)
    prepared = SFTTrainer._prepare_dataset(trainer, read, loaded, settings, True, None, "train")
    seconds = time.perf_counter() - began
    tokens = sum(map(len, prepared["input_ids"]))
    return {"seconds": seconds, "rows": len(read) / seconds, "full": tokens / len(prepared) / MAX_LENGTH}


def make_inputs(work: str) -> None:
    """Write docstrings.jsonl, many-N.jsonl, and SmolLM2's tokenizer, of the GGUF file that make setup installs."""
    import docstrings
    import run_demo
    from llama_lora import environment as environment
    from llama_lora.config import Model
    from llama_lora.data.snapshot import tokenizer_folder

    folder = Path(work)
    tokenizer_folder(Model(path=str(run_demo.smollm2().resolve())), folder / "tokenizer")
    questions = docstrings.question_rows()
    write(folder / "docstrings.jsonl", questions[:ROWS])
    for count in MANY:
        repeated = (questions[number % len(questions)] for number in range(count))
        different = ({"question": f"{number}. {each['question']}"} | each for number, each in enumerate(repeated))
        write(folder / f"many-{count}.jsonl", [each | {"answer": each["answer"][:SHORT]} for each in different])


def write(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def prepare(work: Path, side: str, rows: str, processes: int, libraries: Libraries, output: Path) -> Measured:
    tokenizer = work / libraries.environment / "tokenizer"
    return call("bench.preparing", side, work / XLA.environment / rows, tokenizer, processes, output, libraries=libraries)


def inputs(work: Path, *environments: Libraries) -> None:
    """Made by each set of libraries: one need not read the other's tokenizer files."""
    for libraries in environments:
        folder = work / libraries.environment
        folder.mkdir()
        call("bench.preparing", "make_inputs", folder, libraries=libraries)


def measure_speed(work: Path) -> dict[str, Sides]:
    inputs(work, XLA, TRL_NEWEST)
    found = {}
    for name, processes, libraries in (("1", 1, TRL_024), ("2", 2, TRL_024), ("newest-2", 2, TRL_NEWEST)):
        sides = {
            side: partial(prepare, work, side, "docstrings.jsonl", processes, libraries) for side in ("ours", "trl")
        }
        rounds = alternate(work, sides)
        found[f"tokenize-{name}"] = compared(rounds, inner, theirs="trl")
        if name == "1":
            found["tokenize-packing"] = compared(rounds, lambda each: 100 * each.told["full"], theirs="trl")
    return found


def measure_many(work: Path) -> dict[str, Sides]:
    inputs(work, XLA)
    sides = {
        str(count // MANY[0]): partial(prepare, work, "ours", f"many-{count}.jsonl", 1, TRL_024) for count in MANY
    }
    rounds = alternate(work, {**sides, "trl": partial(prepare, work, "trl", f"many-{MANY[-1]}.jsonl", 1, TRL_024)})
    once, most = rounds["1"], rounds["16"]
    return {
        **linear("tokenize", rounds),
        "tokenize-memory": compared(rounds, peak, "16", "trl"),
        "tokenize-memory-growth": Sides([each.peak for each in most], [each.peak for each in once]),
    }


def lacks_trl(*environments: Libraries) -> str:
    """What of the environments is not set up."""
    folders = [folder for each in environments for folder in (each.environment, each.beside)]
    from bench.measure import ROOT

    missing = [folder for folder in folders if not (ROOT / folder).is_dir()]
    return f"peer not installed: {missing[0]} not found (make bench sets it up)" if missing else ""


BENCHES = [
    Bench(
        [
            Line("tokenize-1", f"tokenize and pack {ROWS:,} docstrings, 1 process: time", "s", Goal(0.4), "trl"),
            Line("tokenize-2", f"tokenize and pack {ROWS:,} docstrings, 2 processes: time", "s", Goal(0.4), "trl"),
            Line("tokenize-newest-2", "the same with the newest libraries and TRL", "s", Goal(0.4), "trl"),
            Line("tokenize-packing", f"packed rows are full, of {MAX_LENGTH} tokens", "%", Goal(99, least=True), "trl", of_ours=True),
        ],
        measure_speed,
        partial(lacks_trl, TRL_024, TRL_NEWEST),
    ),
    Bench(
        [
            Line("tokenize-memory", f"tokenize and pack {MANY[-1]:,} short rows: peak memory", "MiB", Goal(1.0), "trl"),
            Line("tokenize-memory-growth", f"peak memory with {MANY[-1]:,} rows", "MiB", Goal(1.2), f"with {MANY[0]:,}"),
            *growth_lines("tokenize", "tokenize and pack", "rows", MANY[0]),
        ],
        measure_many,
        partial(lacks_trl, TRL_024),
    ),
]

if __name__ == "__main__":
    serve(globals())
