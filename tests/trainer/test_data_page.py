"""Every example of docs/data.md is rendered as the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llama_lora.data.rendering import Renderer
from llama_lora.data.rows import Row
from llama_lora.data.tokens import IGNORED, ExampleTokenizer
from trainer.chat_templates import family_tokenizer

PAGE = Path(__file__).parents[2] / "docs/data.md"
FAMILIES = {
    "Llama 3": "llama-3",
    "Qwen2.5": "qwen2.5-base",
    "Qwen3": "qwen3",
    "R1 distilled": "deepseek-r1",
    "no chat template": "",
}
EXAMPLE = re.compile(
    r"`format: (?P<format>[a-z-]+)`(?:, `[\w.]+: [\w.-]+`)*, (?P<family>[^:`]+):\n\n"
    r"```json\n(?P<row>.+?)\n```\n\n(?P<outputs>(?:```text\n.+?\n```\n\n)+)",
    re.DOTALL,
)
FOUND = list(EXAMPLE.finditer(PAGE.read_text(encoding="utf-8")))


def masked(values: dict[str, Any], family: str, format: str, columns: dict[str, str], **settings: Any) -> list[str]:
    """The text of a row's examples by their tokens, with the trained parts between « and »."""
    tokenizer = family_tokenizer(family or "llama-3")
    if not family:
        tokenizer.chat_template = None
    texts = []
    for rendered in Renderer(tokenizer, format, columns, **settings).render(Row("rows.jsonl:1", values)):
        example, _ = ExampleTokenizer(tokenizer).example(rendered, 10_000)
        runs: list[tuple[bool, list[int]]] = []
        for token, label in zip(example.input_ids, example.labels, strict=True):
            if not runs or runs[-1][0] != (label != IGNORED):
                runs.append((label != IGNORED, []))
            runs[-1][1].append(token)
        pieces = [(trained, tokenizer.decode(ids)) for trained, ids in runs]
        texts.append("".join(f"«{text}»" if trained else text for trained, text in pieces).rstrip("\n"))
    return texts


@pytest.mark.parametrize("example", FOUND, ids=lambda example: f"{example['format']}-{example['family']}")
def test_an_example_is_rendered_as_the_page_says(example: re.Match[str]) -> None:
    outputs = re.findall(r"```text\n(.+?)\n```", example["outputs"], re.DOTALL)
    assert masked(json.loads(example["row"]), FAMILIES[example["family"]], example["format"], {}) == outputs


def test_the_page_has_an_example_of_every_format() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(FOUND) == text.count("```json") and text.count("```text") > len(FOUND)
    assert {example["format"] for example in FOUND} == {"text", "instruction", "prompt-completion", "chat"}
