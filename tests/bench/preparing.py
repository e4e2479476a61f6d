"""Preparing rows (reading, rendering, tokenizing, packing, writing) against TRL's preparation of the same rows.

The rows are Python's docstrings as {question, answer}, the tokenizer SmolLM2's. TRL prepares as a user of SFTTrainer
does: load_dataset, map, and what the trainer calls. Imports and loading the tokenizer are not part of the times.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench import measure
from bench.measure import SMALL, TRL_024, TRL_NEWEST, Bench, Libraries, alternate, call, compared
from bench.table import Goal, Line, Result

LENGTH = 2048
ROWS = 800 if SMALL else 4000
MANY = 100 if SMALL else 7473  # rows of gsm8k; and 4 and 16 times as many
SHORT = 80  # characters of an answer where the rows are many, so that TRL takes no minutes


def prepare(rows: str, tokenizer: str, processes: int, output: str) -> dict[str, float]:
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
            "training": {"maxSequenceLength": LENGTH},
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
    return {"seconds": seconds, "full": 100 * report["train"]["packing_efficiency"]}


def prepare_with_trl(rows: str, tokenizer: str, processes: int, output: str) -> dict[str, float]:
    """Prepare rows with TRL and its default packing, best-fit-decreasing."""
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
    settings = SFTConfig(output, max_length=LENGTH, packing=True, dataset_num_proc=several, **options)
    trainer = SimpleNamespace(_is_vlm=False, _tokenizer=loaded, chat_template=None, completion_only_loss=True)
    began = time.perf_counter()
    read = load_dataset("json", data_files=rows, split="train", cache_dir=f"{output}/cache")
    read = read.map(conversation, remove_columns=read.column_names, num_proc=several)
    prepared = SFTTrainer._prepare_dataset(trainer, read, loaded, settings, True, None, "train")
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "full": 100 * sum(map(len, prepared["input_ids"])) / len(prepared) / LENGTH}


def make_inputs(folder: str) -> None:
    """Write rows.jsonl, N.jsonl for each number of many rows, and SmolLM2's tokenizer, which make setup installs."""
    import docstrings
    import run_demo

    from llama_lora import environment as environment
    from llama_lora.config import Model
    from llama_lora.data.snapshot import tokenizer_folder

    tokenizer_folder(Model(path=str(run_demo.smollm2().resolve())), Path(folder, "tokenizer"))
    questions = docstrings.question_rows()
    files = {"rows": questions[:ROWS], **{str(n * MANY): many(questions, n * MANY) for n in measure.TIMES}}
    for name, rows in files.items():
        Path(folder, f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def many(questions: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    """Short rows, each different from all others."""
    repeated = (questions[number % len(questions)] for number in range(count))
    return [
        {"question": f"{number}. {each['question']}", "answer": each["answer"][:SHORT]}
        for number, each in enumerate(repeated)
    ]


def sides(work: Path, rows: str, processes: int, libraries: Libraries) -> dict[str, Any]:
    """Both sides. Each set of libraries makes its inputs: it need not read the other's tokenizer files."""
    folder = work / libraries.environment
    if not folder.exists():
        folder.mkdir()
        call(make_inputs, folder, libraries=libraries)
    functions = {"ours": prepare, "trl": prepare_with_trl}
    return measure.processes(functions, folder / rows, folder / "tokenizer", processes, libraries=libraries)


def measure_speed(work: Path) -> dict[str, Result]:
    found = {}
    for name, processes, libraries in (("1", 1, TRL_024), ("2", 2, TRL_024), ("newest-2", 2, TRL_NEWEST)):
        rounds = alternate(work, sides(work, "rows.jsonl", processes, libraries))
        found[f"tokenize-{name}"] = compared(rounds, "seconds", "ours", "trl")
        found["tokenize-packing"] = compared(rounds, "full", "ours", "trl")
    return found


def measure_many(work: Path) -> dict[str, Result]:
    of_size = {n: sides(work, f"{n * MANY}.jsonl", 1, TRL_024) for n in measure.TIMES}
    ours = {str(n): both["ours"] for n, both in of_size.items()}
    rounds = alternate(work, {**ours, "trl": of_size[measure.TIMES[-1]]["trl"]})
    return {
        "tokenize-memory": compared(rounds, "peak", "16", "trl"),
        "tokenize-memory-growth": compared(rounds, "peak", "16", "1"),
        **measure.grown("tokenize", rounds),
    }


WORK = f"tokenize and pack {ROWS:,} docstrings"
MOST = f"tokenize and pack {16 * MANY:,} short rows, 1 process"
FULL = Line("tokenize-packing", f"{WORK}: packed rows are full", "%", Goal(99, least=True), "trl", of_ours=True)
BENCHES = [
    Bench(
        [
            Line("tokenize-1", f"{WORK}, 1 process: time", "s", Goal(0.4), "trl"),
            Line("tokenize-2", f"{WORK}, 2 processes: time", "s", Goal(0.4), "trl"),
            Line("tokenize-newest-2", f"{WORK}, 2 processes: time", "s", Goal(0.4), "trl"),
            FULL,
        ],
        measure_speed,
        TRL_024.lacking or TRL_NEWEST.lacking,
    ),
    Bench(
        [
            Line("tokenize-memory", f"{MOST}: peak memory", "MiB", Goal(1.0), "trl"),
            Line("tokenize-memory-growth", f"{MOST}: peak memory", "MiB", Goal(1.2), f"{MANY:,} rows"),
            *measure.growth_lines("tokenize", "tokenize and pack", "rows", MANY),
        ],
        measure_many,
        TRL_024.lacking,
    ),
]
