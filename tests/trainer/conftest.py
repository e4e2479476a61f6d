"""A tiny Llama with a byte-level tokenizer, made here; a run config around it; and the llama-lora command."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from llama_lora import config as run_config
from llama_lora.cli import main
from llama_lora.paths import Paths
from trainer.warm import WarmPopen

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """Every byte is a token, and <|bos|>, <|start|>, <|end|> are one each; <|end|> ends a sequence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>", "<|start|>", "<|end|>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 256)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|start|>"],
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.chat_template = chat_template
    return fast


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


def make_model(folder: Path, dtype: str = "float32", max_shard_size: str = "5GB", **changes: Any) -> Path:
    """A random two-layer Llama with the byte tokenizer, as a model folder."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(eos_token_id=258, bos_token_id=256, max_length=77)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(folder)
    return folder


def plain_lora_model(folder: Path, lora: run_config.Lora, seed: int) -> Any:
    """The model as transformers and peft load it, with the initial adapter of every backend."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from llama_lora.backends.lora import initialize_lora, lora_config

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora_config(lora))
    initialize_lora(model.named_parameters(), seed)
    return model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def write_rows(path: Path, count: int = 40) -> Path:
    """Questions and answers of different lengths, as JSON lines."""
    rows = ({"q": f"What is {n} + {n}?", "a": f"It is {n + n}. " + "So it is. " * (n % 4)} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


DISTRIBUTED = ("compile", "rehearse", "train")  # start workers
LLAMA_LORA = str(Path(sys.executable).with_name("llama-lora"))


@dataclass
class Run:
    """A run in a workspace of its own. ``config`` may be changed between commands."""

    folder: Path
    config: dict[str, Any]

    @property
    def workspace(self) -> Path:
        return self.folder / "workspace"

    @property
    def paths(self) -> Paths:
        return Paths(self.workspace, self.config["name"])

    def write_config(self) -> Path:
        file = self.folder / "run.yaml"
        file.write_text(yaml.safe_dump(self.config), encoding="utf-8")
        return file

    def load(self) -> run_config.RunConfig:
        return run_config.load(self.write_config())

    def __call__(self, stage: str, *arguments: str, status: int = 0, **environment: str) -> str:
        """Run a stage as the chart does; its output. Fails the test when it ends with another status."""
        command = [stage, *arguments, "--config", str(self.write_config()), "--workspace", str(self.workspace)]
        if stage in DISTRIBUTED or environment:
            popen = WarmPopen if self.config["backend"] in ("cpu", "native") else subprocess.Popen
            return llama_lora(*command, status=status, popen=popen, **environment)
        return llama_lora_here(*command, status=status)

    def copy(self, folder: Path) -> Run:
        """The run as it stands, in a workspace of its own."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Run(folder, copy.deepcopy(self.config))

    def run_through(self, last: str) -> None:
        """Every stage up to ``last``."""
        for stage in ("tokenize", "compile", "train", "consolidate", "merge", "evaluate"):
            self(stage)
            if stage == last:
                return

    @property
    def rows(self) -> int:
        """The rows that are trained on."""
        from datasets import load_from_disk

        return len(load_from_disk(str(self.workspace / self.manifest("tokenize")["facts"]["dataset"] / "train")))

    def manifest(self, stage: str) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads(self.paths.manifest(stage).read_text(encoding="utf-8"))
        return manifest


def write_checkpoint_record(file: Path, record: dict[str, Any]) -> None:
    """Write a changed checkpoint.json with its new digest, as if the trainer had written it."""
    from genvalues.common.json_files import with_own_digest

    file.write_text(json.dumps(with_own_digest(record)), encoding="utf-8")


def llama_lora(
    *arguments: str, status: int = 0, popen: type[subprocess.Popen[str]] = subprocess.Popen, **environment: str
) -> str:
    """Run the llama-lora command as a process; its output, both streams."""
    process = popen(
        [LLAMA_LORA, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said, _ = process.communicate()
    assert process.returncode == status, f"{' '.join(arguments)} ended with {process.returncode}:\n{said}"
    assert "Traceback" not in said, said
    return said


def llama_lora_here(*arguments: str, status: int = 0) -> str:
    """The same in this process, which has torch imported already: seconds less."""
    ended = CliRunner().invoke(main, arguments)
    if ended.exception and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    assert ended.exit_code == status, f"{' '.join(arguments)} ended with {ended.exit_code}:\n{ended.output}"
    return ended.output


def make_run(folder: Path, model: Path, **changes: dict[str, Any]) -> Run:
    """A run of ``model`` on forty short rows; keywords change sections of the config."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "name": "run",
        "backend": "cpu",
        "model": {"path": str(model)},
        "dataset": {
            "source": str(write_rows(folder / "rows.jsonl")),
            "format": "instruction",
            "columns": {"instruction": "q", "output": "a"},
            "evalFraction": 0.1,
        },
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0, "targetModules": ["q_proj", "v_proj"]},
        "training": {
            "maxSequenceLength": 128,
            "packing": True,
            "perDeviceBatchSize": 1,
            "gradientAccumulationSteps": 2,
            "epochs": 1,
            "maxSteps": 6,
            "learningRate": 1e-2,
            "lrScheduler": "linear",
            "warmupRatio": 0.1,
            "weightDecay": 0.01,
            "maxGradNorm": 1.0,
            "saveSteps": 2,
            "saveTotalLimit": 2,
            "seed": 42,
        },
        "evaluation": {"enabled": True, "maxRows": 8, "samples": 2, "maxNewTokens": 8},
        "parallelism": {"nodes": 1, "processesPerNode": 1, "tensorParallelSize": 1, "dataParallelSize": 1},
    }
    for section, values in changes.items():
        config[section] = {**config[section], **values}
    return Run(folder, config)


@pytest.fixture
def new_run(tiny_model: Path, tmp_path: Path) -> Callable[..., Run]:
    """Makes runs in which nothing has run yet."""
    return lambda name="run", **changes: make_run(tmp_path / name, tiny_model, **changes)


@pytest.fixture(scope="session")
def whole_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run with every stage done, by two workers. Not to be changed: see ``finished_run``."""
    run = make_run(tmp_path_factory.mktemp("whole"), tiny_model, parallelism=TWO_PROCESSES)
    run.run_through("evaluate")
    return run


@pytest.fixture
def finished_run(whole_run: Run, tmp_path: Path) -> Run:
    """A run with every stage done, to change at will."""
    return whole_run.copy(tmp_path / "finished")


TWO_PROCESSES = {"processesPerNode": 2, "dataParallelSize": 2}
