"""The tokens and labels of conversations, compared with what each model's chat template says a turn is.

The oracles below are written from the text of the templates, without Jinja: pieces of text, each trained or not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest

from llama_lora.data.rendering import Renderer
from llama_lora.data.rows import Row
from llama_lora.data.tokens import IGNORED, ExampleTokenizer
from trainer.chat_templates import FAMILIES, family_tokenizer

Message = dict[str, Any]
Pieces = list[tuple[str, bool]]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, **other: Any) -> Message:
    return {"role": "assistant", "content": text, **other}


def call(name: str, **arguments: Any) -> Message:
    """A call as OpenAI's API returns it: no content, and arguments as JSON text."""
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


NEWLINE = "\n"  # Python before 3.12 has no backslash in an f-string
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
ONE = [user("2+2?"), assistant("4.")]
MORE = [user("2+2?"), assistant("4.\n"), user("\nTimes 3?"), assistant(" It is 12.")]
LONG = [turn for n in range(40) for turn in (user(f"Question {n}?"), assistant(f"Answer {n}."))]
WITH_TOOLS = [user("2+2?"), call("add", a=2, b=2), {"role": "tool", "content": "4"}, assistant("It is 4.")]
THOUGHTS = [
    user("2+2?"),
    assistant("4.", reasoning_content="Two and two."),
    user("Times 3?"),
    assistant("<think>\nThree fours.\n</think>\n\n12."),
]
CONVERSATIONS = {"one": ONE, "more": MORE, "system": [SYSTEM, *MORE], "long": LONG}


def llama_3(messages: list[Message], tools: list[Any]) -> list[Pieces]:
    pieces: Pieces = [("<|begin_of_text|>", False)]
    for message in messages:
        pieces.append((f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", False))
        pieces.append((f"{message['content'].strip()}<|eot_id|>", message["role"] == "assistant"))
    return [pieces]


def llama_3_1(messages: list[Message], tools: list[Any]) -> list[Pieces]:
    head = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    head += "Environment: ipython\n" if tools else ""
    head += "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    if messages[0]["role"] == "system":
        head += messages[0]["content"]
        messages = messages[1:]
    head += "<|eot_id|>"
    if tools:
        head += "<|start_header_id|>user<|end_header_id|>\n\nFunctions:\n\n"
        head += "".join(json.dumps(tool, indent=4) + "\n\n" for tool in tools)
        head += messages[0]["content"] + "<|eot_id|>"
        messages = messages[1:]
    pieces: Pieces = [(head, False)]
    for message in messages:
        role = {"tool": "ipython"}.get(message["role"], message["role"])
        pieces.append((f"<|start_header_id|>{role}<|end_header_id|>\n\n", False))
        text = (message["content"] or "").strip()
        if role == "ipython":
            text = json.dumps(text)
        for each in message.get("tool_calls", []):
            text = f'{{"name": "{each["function"]["name"]}", "parameters": {each["function"]["arguments"]}}}'
        pieces.append((f"{text}<|eot_id|>", role == "assistant"))
    return [pieces]


def qwen_2_5(messages: list[Message], tools: list[Any], system: str = "You are Qwen.") -> list[Pieces]:
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    pieces: Pieces = []
    if tools:
        listed = "".join("\n" + json.dumps(tool) for tool in tools)
        pieces = [(f"<|im_start|>system\n{system}\n\n# Tools\n<tools>{listed}\n</tools><|im_end|>\n", False)]
    elif system:
        pieces = [(f"<|im_start|>system\n{system}<|im_end|>\n", False)]
    for message in messages:
        text = message["content"] or ""
        for each in message.get("tool_calls", []):
            function = each["function"]
            text += f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {function["arguments"]}}}\n</tool_call>'
        if message["role"] == "assistant":
            pieces += [("<|im_start|>assistant\n", False), (f"{text}<|im_end|>", True), ("\n", False)]
        elif message["role"] == "tool":
            pieces.append((f"<|im_start|>user\n<tool_response>\n{text}\n</tool_response><|im_end|>\n", False))
        else:
            pieces.append((f"<|im_start|>{message['role']}\n{text}<|im_end|>\n", False))
    return [pieces]


def qwen_3(messages: list[Message], tools: list[Any]) -> list[Pieces]:
    """A turn is generated after a history without thoughts, with its own thought, even if that is empty."""
    examples = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            thought, _, answer = message["content"].rpartition("</think>\n\n")
            thought = message.get("reasoning_content") or thought.removeprefix("<think>\n").rstrip("\n")
            bare = [{**each, "content": (each["content"] or "").split("</think>\n\n")[-1]} for each in messages[:index]]
            [pieces] = qwen_2_5([*bare, user("unused")], tools, system="")
            history = "".join(text for text, _ in pieces[:-1])
            turn = f"<think>\n{thought}\n</think>\n\n{answer.lstrip(NEWLINE)}<|im_end|>"
            examples.append([(history + "<|im_start|>assistant\n", False), (turn, True), ("\n", False)])
    return examples


def granite(messages: list[Message], tools: list[Any]) -> list[Pieces]:
    if messages[0]["role"] != "system":
        default = "Knowledge Cutoff Date: April 2024.\nToday's Date: July 26, 2024."
        messages = [{"role": "system", "content": default}, *messages]
    pieces: Pieces = []
    for message in messages:
        answer = message["role"] == "assistant"
        pieces.append((f"<|start_of_role|>{message['role']}<|end_of_role|>", False))
        pieces += [(f"{message['content']}<|end_of_text|>", answer), ("\n", False)]
    return [pieces]


def gemma(messages: list[Message], tools: list[Any]) -> list[Pieces]:
    pieces: Pieces = [("<bos>", False)]
    for message in messages:
        answer = message["role"] == "assistant"
        pieces.append((f"<start_of_turn>{'model' if answer else message['role']}\n", False))
        pieces += [(f"{message['content'].strip()}<end_of_turn>", answer), ("\n", False)]
    return [pieces]


def smollm_2(messages: list[Message], tools: list[Any]) -> list[Pieces]:
    return qwen_2_5(messages, [], system="You are SmolLM.")


def gpt_oss(messages: list[Message], tools: list[Any]) -> list[Pieces]:
    examples = []
    history = ""
    for message in messages:
        if message["role"] != "assistant":
            history += f"<|start|>{message['role']}<|message|>{message['content']}<|end|>"
            continue
        final = f"<|channel|>final<|message|>{message['content']}"
        thought = message.get("reasoning_content", "")
        if thought:
            thought = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant"
        examples.append([(history + "<|start|>assistant", False), (f"{thought}{final}<|return|>", True)])
        history += f"<|start|>assistant{final}<|end|>"
    return examples


def deepseek_r1(messages: list[Message], tools: list[Any]) -> list[Pieces]:
    examples = []
    history = "<|begin_of_sentence|>"
    for message in messages:
        if message["role"] == "user":
            history += f"<|User|>{message['content']}"
            continue
        thought, _, answer = message["content"].rpartition("</think>")
        thought = message.get("reasoning_content", thought.removeprefix("<think>")).strip()
        turn = f"{thought}\n</think>\n\n{answer.lstrip(NEWLINE)}<|end_of_sentence|>"
        examples.append([(history + "<|Assistant|><think>\n", False), (turn, True)])
        history += f"<|Assistant|>{answer}<|end_of_sentence|>"
    return examples


ORACLES: dict[str, Callable[[list[Message], list[Any]], list[Pieces]]] = {
    "llama-3": llama_3,
    "llama-3.1": llama_3_1,
    "qwen2.5": qwen_2_5,
    "qwen2.5-base": qwen_2_5,
    "qwen3": qwen_3,
    "granite": granite,
    "gemma": gemma,
    "smollm2": smollm_2,
    "gpt-oss": gpt_oss,
    "deepseek-r1": deepseek_r1,
}


def expected(tokenizer: Any, pieces: Pieces) -> tuple[list[int], list[int]]:
    """Token ids and labels. Text without a loss is tokenized whole up to the answer, as at generation time."""
    ids: list[int] = []
    labels: list[int] = []
    for trained, run in groupby(pieces, key=lambda piece: piece[1]):
        found = tokenizer("".join(text for text, _ in run), add_special_tokens=False).input_ids
        ids += found
        labels += found if trained else [IGNORED] * len(found)
    return ids, labels


def found(tokenizer: Any, values: dict[str, Any], **settings: Any) -> list[tuple[list[int], list[int]]]:
    tokens = ExampleTokenizer(tokenizer)
    examples = Renderer(tokenizer, "chat", {}, **settings).render(Row("rows.jsonl:1", values))
    made = [tokens.example(example, 100_000)[0] for example in examples]
    return [(list(example.input_ids), list(example.labels)) for example in made]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_answers_with_their_end_of_turn_are_trained_as_the_template_says(name: str, conversation: str) -> None:
    messages = CONVERSATIONS[conversation]
    if name in ("gemma", "deepseek-r1") and messages[0] is SYSTEM:  # not in these templates
        messages = messages[1:]
    tokenizer = family_tokenizer(name)
    wanted = [expected(tokenizer, pieces) for pieces in ORACLES[name](messages, [])]
    assert found(tokenizer, {"messages": messages}) == wanted


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss", "deepseek-r1"])
def test_thoughts_are_trained_with_their_own_answer_only(name: str) -> None:
    tokenizer = family_tokenizer(name)
    messages = THOUGHTS[:2] + ONE if name == "gpt-oss" else THOUGHTS  # gpt-oss knows no <think>
    wanted = [expected(tokenizer, pieces) for pieces in ORACLES[name](messages, [])]
    assert found(tokenizer, {"messages": messages}) == wanted and len(wanted) == 2


@pytest.mark.parametrize("name", ["llama-3.1", "qwen2.5"])
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tool_calls_are_trained_and_the_results_of_tools_are_not(name: str, tools: Any) -> None:
    tokenizer = family_tokenizer(name)
    [pieces] = ORACLES[name](WITH_TOOLS, [TOOL])
    assert found(tokenizer, {"messages": WITH_TOOLS, "tools": tools}) == [expected(tokenizer, pieces)]
    assert sum(trained for _, trained in pieces) == 2


def test_a_template_that_expects_arguments_as_text_gets_json() -> None:
    tokenizer = family_tokenizer("deepseek-r1")
    ids, labels = found(tokenizer, {"messages": WITH_TOOLS[:2]})[0]
    assert tokenizer.decode(ids) == (
        "<|begin_of_sentence|><|User|>2+2?<|Assistant|><think>\n\n</think>\n\n"
        '<|tool_call|>add\n{"a": 2, "b": 2}<|end_of_sentence|>'
    )
    assert labels[-1] == tokenizer.eos_token_id
