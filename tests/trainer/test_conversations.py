"""The shapes in which datasets have conversations: all of them give the same example."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

import pytest

from genvalues.common.errors import UserError
from llama_lora.data.chat_template import ChatTemplate
from llama_lora.data.rendering import Dropped, RenderedExample, Renderer
from llama_lora.data.rows import Row, RowError
from llama_lora.data.tokens import IGNORED, ExampleTokenizer
from trainer.chat_templates import family_tokenizer
from trainer.conftest import CHAT_TEMPLATE, byte_tokenizer

PLACE = "rows.jsonl:3"


def render(values: dict[str, Any], format: str = "chat", name: str = "", **settings: Any) -> list[RenderedExample]:
    tokenizer = family_tokenizer(name) if name else byte_tokenizer()
    columns = settings.pop("columns", {})
    return Renderer(tokenizer, format, columns, **settings).render(Row(PLACE, values))


def shown(values: dict[str, Any], format: str = "chat", name: str = "", **settings: Any) -> str:
    """The text of the row's examples, with the trained parts in [brackets], by its tokens."""
    tokenizer = family_tokenizer(name) if name else byte_tokenizer()
    texts = []
    for rendered in render(values, format, name, **settings):
        example, _ = ExampleTokenizer(tokenizer).example(rendered, 100_000)
        text, trained = "", False
        for token, label in zip(example.input_ids, example.labels, strict=True):
            if (label != IGNORED) != trained:
                trained = not trained
                text += "[" if trained else "]"
            text += tokenizer.decode([token])
        texts.append(text + ("]" if trained else ""))
    return "\n---\n".join(texts)


def turn(role: str, text: str, answer: bool = False) -> str:
    return f"<|start|>{role}\n" + (f"[{text}<|end|>]\n" if answer else f"{text}<|end|>\n")


USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Yes?"}
PARTS = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
PAIR = turn("user", "Hi") + turn("assistant", "Yes?", answer=True)
CALL = {"name": "add", "arguments": {"a": 1}}


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [USER, ANSWER]},
        {"messages": json.dumps([USER, ANSWER])},
        {"messages": json.dumps({"messages": [USER, ANSWER]})},
        {"messages": ({"role": "User", "content": "Hi"}, {"role": " ASSISTANT", "content": "Yes?"})},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]},
        {"conversations": [{"from": "HUMAN", "value": "Hi"}, {"from": "bot", "value": "Yes?"}]},
        {"messages": [{"role": "user", "content": PARTS}, ANSWER]},
        {"messages": [{**USER, "name": None, "tool_calls": []}, {**ANSWER, "tool_calls": None}]},
        {"messages": [{"role": "system", "content": None}, USER, ANSWER]},
        {"messages": [USER, ANSWER, {"role": "user", "content": "Bye"}]},
    ],
)  # fmt: skip
def test_every_shape_of_a_conversation_gives_the_same_example(values: dict[str, Any]) -> None:
    assert shown(values) == PAIR


def test_sharegpt_with_a_system_prompt_and_a_nested_column() -> None:
    values = {"data": {"turns": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]}, "system": "Be."}
    assert shown(values, columns={"messages": "data.turns"}) == turn("system", "Be.") + PAIR
    renderer = Renderer(byte_tokenizer(), "chat", {"messages": "data.turns", "tools": "data.tols"})
    renderer.render(Row(PLACE, values))
    assert renderer.columns.found == {"messages"}


def test_a_greeting_of_the_assistant_is_kept_without_a_loss() -> None:
    greeting = {"role": "assistant", "content": "Welcome."}
    assert shown({"messages": [greeting, USER, ANSWER]}) == turn("assistant", "Welcome.") + PAIR
    with pytest.raises(Dropped, match="no assistant turn has a loss"):
        render({"messages": [greeting, USER]})


@pytest.mark.parametrize("role", ["column", "system", "developer"])
def test_a_greeting_after_a_system_prompt_has_no_loss(role: str) -> None:
    messages = [{"role": "assistant", "content": "Welcome."}, USER, ANSWER]
    column = {"system": "Be."} if role == "column" else {}
    first = [] if column else [{"role": role, "content": "Be."}]
    rest = turn("assistant", "Welcome.") + PAIR
    assert shown({"messages": [*first, *messages], **column}) == turn("system", "Be.") + rest


def test_an_answer_that_only_a_system_prompt_asks_for_is_trained() -> None:
    whole = turn("system", "Be.") + turn("assistant", "Yes?", answer=True)
    system = {"role": "system", "content": "Be."}
    assert shown({"messages": [system, ANSWER]}) == whole
    assert shown({"prompt": [system], "completion": [ANSWER]}, "prompt-completion") == whole


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": 0.0}, {"weight": "0"}, {"train": False}, {"train": "false"}, {"masked": True}]
)
def test_a_marked_answer_has_no_loss(mark: dict[str, Any]) -> None:
    marked = [USER, {**ANSWER, **mark}, USER, {**ANSWER, "weight": 1, "train": True, "masked": False}]
    assert shown({"messages": marked}) == turn("user", "Hi") + turn("assistant", "Yes?") + PAIR
    with pytest.raises(Dropped, match="no assistant turn has a loss"):
        render({"messages": marked[:2]})


@pytest.mark.parametrize(
    ("mark", "trained"),
    [
        ({"weight": "0.00"}, False),
        ({"weight": "-0"}, False),
        ({"weight": "1.0"}, True),
        ({"weight": 0.5}, True),
        ({"weight": Decimal("0.0")}, False),
        ({"train": " No "}, False),
        ({"train": "yes"}, True),
        ({"masked": "0"}, True),
        ({"masked": "TRUE"}, False),
        ({"weight": "", "train": None, "masked": math.nan}, True),
    ],
)
def test_a_mark_may_be_a_number_or_a_word_as_text(mark: dict[str, Any], trained: bool) -> None:
    marked = turn("assistant", "Yes?", answer=trained)
    assert shown({"messages": [USER, {**ANSWER, **mark}, USER, ANSWER]}) == turn("user", "Hi") + marked + PAIR


@pytest.mark.parametrize("mark", [{"train": "off"}, {"train": "none"}, {"masked": "null"}, {"weight": [0]}])
def test_a_mark_of_another_word_is_a_bad_row_with_its_key(mark: dict[str, Any]) -> None:
    [(key, value)] = mark.items()
    with pytest.raises(RowError) as error:
        render({"messages": [USER, {**ANSWER, **mark}]})
    assert str(error.value) == (
        f"{PLACE}: column messages has a message with {key}: {str(value)!r}. Write true, false or a number; 0 is false."
    )


def test_train_on_last_answer_trains_the_last_answer_only() -> None:
    messages = [USER, ANSWER, USER, ANSWER]
    assert (
        shown({"messages": messages}, train_on="last-answer") == turn("user", "Hi") + turn("assistant", "Yes?") + PAIR
    )
    values = {"instruction": "Hi", "output": "Yes?", "history": [["Hi", "Yes?"]]}
    assert shown(values, "instruction", train_on="last-answer") == shown({"messages": messages}, train_on="last-answer")


def test_keys_that_the_template_does_not_read_are_counted_by_name() -> None:
    renderer = Renderer(family_tokenizer("llama-3"), "chat", {})
    for _ in range(2):
        values = {
            "messages": [{**USER, "id": 5, "name": "Al"}, {**ANSWER, "reasoning_content": "Hm."}],
            "tools": [CALL],
        }
        renderer.render(Row(PLACE, values))
    noted = {note: count for note, count in renderer.notes.items() if "ignored key" in note}
    assert sorted(note.split()[2].rstrip(":") for note in noted) == ["id", "name", "reasoning_content", "tools"]
    assert set(noted.values()) == {2}


def test_keys_that_the_template_reads_are_rendered_and_not_counted() -> None:
    renderer = Renderer(family_tokenizer("qwen3"), "chat", {})
    for key in ("reasoning_content", "thinking", "reasoning"):
        [example] = renderer.render(Row(PLACE, {"messages": [USER, {**ANSWER, key: "Hm."}], "tools": [CALL]}))
        assert example.segments[1].text == "<think>\nHm.\n</think>\n\nYes?<|im_end|>"
    assert not renderer.notes


@pytest.mark.parametrize("family", ["llama-3.1", "qwen2.5", "qwen3", "deepseek-r1"])
def test_a_key_that_the_template_reads_from_tool_calls_only_is_counted(family: str) -> None:
    renderer = Renderer(family_tokenizer(family), "chat", {})
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    renderer.render(Row(PLACE, {"messages": [{**USER, "name": "Ann"}, call]}))
    assert [note for note in renderer.notes if "ignored" in note] == [
        "ignored key name: the chat template does not read it"
    ]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.name }}{% endfor %}",
        "{% for m in messages[1:] | reverse %}{{ m['name'] }}{% endfor %}",
        "{% set last = messages[-1] %}{% if 'name' in last %}{{ last }}{% endif %}",
        "{% set ns = namespace(last=messages[0]) %}{{ ns.last.name }}",
        "{% macro turn(m) %}{{ m.get('name') }}{% endmacro %}{{ turn(messages[0]) }}",
        "{{ messages | selectattr('name') | list }}",
        "{% for m in messages %}{% for call in m.tool_calls %}{% set m = call %}{% endfor %}{{ m.name }}{% endfor %}",
    ],
)
def test_keys_of_messages_are_found_wherever_a_template_reads_them(template: str) -> None:
    assert "name" in ChatTemplate(template, {}).message_keys


def test_a_rewritten_history_is_counted() -> None:
    renderer = Renderer(family_tokenizer("qwen3"), "chat", {})
    assert len(renderer.render(Row(PLACE, {"messages": [USER, ANSWER] * 3}))) == 3
    [(note, count)] = renderer.notes.items()
    assert "history" in note and count == 1


@pytest.mark.parametrize(
    "call",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "id": "1", "function": CALL}]},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": None, "tool_calls": [{**CALL, "arguments": '{"a": 1}'}]},
        {"role": "assistant", "content": None, "tool_calls": [{**CALL, "arguments": {"a": 1, "b": None}}]},
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
        {"from": "function_call", "value": json.dumps(CALL)},
    ],
)
@pytest.mark.parametrize("role", [{"role": "tool"}, {"role": "function"}, {"from": "observation"}])
def test_every_shape_of_a_tool_call_is_rendered_and_its_result_has_no_loss(call: Any, role: dict[str, str]) -> None:
    result = {**role, ("value" if "from" in role else "content"): "2"}
    text = shown({"messages": [USER, call, result, ANSWER]}, name="qwen2.5")
    assert text.partition("Hi")[2] == (
        "<|im_end|>\n<|im_start|>assistant\n"
        '[<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>]\n'
        "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\n[Yes?<|im_end|>]\n"
    )


def test_a_function_call_that_is_not_json_is_an_answer() -> None:
    messages = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "add(1)"}]
    assert shown({"messages": messages}) == turn("user", "Hi") + turn("assistant", "add(1)", answer=True)


def test_a_developers_message_is_a_system_message_unless_the_template_knows_it() -> None:
    messages = [{"role": "developer", "content": "Be."}, USER, ANSWER]
    assert shown({"messages": messages}) == turn("system", "Be.") + PAIR
    knows = byte_tokenizer("{# developer #}{% if messages[0].role == 'developer' %}D{% endif %}" + CHAT_TEMPLATE)
    [example] = Renderer(knows, "chat", {}).render(Row(PLACE, {"messages": messages}))
    assert example.segments[0].text.startswith("D<|start|>developer")


def test_a_reason_is_short_whatever_the_template_puts_into_it() -> None:
    wordy = byte_tokenizer("{{ raise_exception(messages[0].content) }}")
    with pytest.raises(Dropped) as reason:
        Renderer(wordy, "chat", {}).render(Row(PLACE, {"messages": [{**USER, "content": "x\n" * 10**5}, ANSWER]}))
    assert len(str(reason.value)) < 300 and "\n" not in str(reason.value)


def test_rows_nested_too_deeply_are_an_error_with_the_row() -> None:
    deep: Any = {}
    for _ in range(5000):
        deep = {"a": deep}
    for value in (deep, "[" * 10**6, '[{"a": ' + "9" * 5000 + "}]"):
        with pytest.raises(UserError) as error:
            render({"messages": [USER, ANSWER], "tools": value})
        assert error.value.where == PLACE


def test_a_tool_call_that_the_template_does_not_render_drops_the_row() -> None:
    """The answer would be trained empty."""
    for name in ("llama-3", ""):
        with pytest.raises(Dropped, match="tool calls"):
            render({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}, name=name)


def test_tools_are_a_top_level_key_a_column_or_a_key_of_the_messages() -> None:
    tools = [{"name": "add", "parameters": {"a": None, "b": "number"}}]
    messages = [USER, ANSWER]
    text = shown({"messages": messages, "tools": tools}, name="qwen2.5")
    assert '<tools>\n{"name": "add", "parameters": {"b": "number"}}\n</tools>' in text
    for values, columns in (
        ({"messages": messages, "functions": json.dumps(tools)}, {"tools": "functions"}),
        ({"messages": {"messages": messages, "tools": tools}}, {}),
    ):
        assert shown(values, name="qwen2.5", columns=columns) == text


def test_a_conversational_prompt_may_be_json_text() -> None:
    values = {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}
    assert render(values, "prompt-completion") == render({"messages": [USER, ANSWER]})
    [example] = render({"prompt": "[1, 2]", "completion": "[{}]"}, "prompt-completion")
    assert [segment.text for segment in example.segments] == ["[1, 2]", "[{}]"]


def test_a_conversational_prompt_may_have_tools() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    values = {"prompt": [USER], "completion": [ANSWER]}
    assert render({**values, "tools": tools}, "prompt-completion") == render(
        {"messages": [USER, ANSWER], "tools": tools}
    )


def test_a_conversational_prompt_and_completion_have_a_loss_on_the_completion_only() -> None:
    prompt = [USER, ANSWER, USER]
    expected = turn("user", "Hi") + turn("assistant", "Yes?") + PAIR
    assert shown({"prompt": prompt, "completion": [ANSWER]}, "prompt-completion") == expected
    assert shown({"prompt": prompt, "completion": "Yes?"}, "prompt-completion") == expected
    assert shown({"prompt": "Hi", "completion": [ANSWER]}, "prompt-completion") == PAIR


@pytest.mark.parametrize(
    ("values", "question"),
    [
        ({"question": "Hi", "answer": "Yes?"}, "Hi"),
        ({"query": "Hi", "response": "Yes?"}, "Hi"),
        ({"instruction": "", "input": "Hi", "output": "Yes?"}, "Hi"),
        ({"instruction": None, "input": "Hi", "output": "Yes?"}, "Hi"),
        ({"instruction": "Say", "input": "Hi", "output": "Yes?"}, "Say\n\nHi"),
        ({"instruction": "Hi", "input": math.nan, "output": "Yes?"}, "Hi"),
        ({"instruction": "Hi", "input": "", "system": None, "history": [], "output": "Yes?"}, "Hi"),
        ({"instruction": b"Hi", "output": "Yes?"}, "Hi"),
    ],
)
def test_instructions_of_every_shape(values: dict[str, Any], question: str) -> None:
    assert shown(values, "instruction") == turn("user", question) + turn("assistant", "Yes?", answer=True)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None])
@pytest.mark.parametrize("answer", [None, "", " \n"])
def test_a_history_with_an_empty_answer_is_dropped(template: str | None, answer: str | None) -> None:
    values = {"instruction": "Hi", "output": "Yes?", "history": [["Hi", "Yes?"], ["Hi", answer]]}
    with pytest.raises(Dropped, match="has an empty assistant turn"):
        Renderer(byte_tokenizer(template), "instruction", {}).render(Row(PLACE, values))


@pytest.mark.parametrize("history", [[["Hi", "Yes?"]], [("Hi", "Yes?")], '[["Hi", "Yes?"]]'])
def test_alpacas_system_and_history_are_turns_before_the_instruction(history: Any) -> None:
    values = {"instruction": "Hi", "output": "Yes?", "system": "Be.", "history": history}
    assert shown(values, "instruction") == turn("system", "Be.") + PAIR + PAIR
    bare = byte_tokenizer(None)
    [example] = Renderer(bare, "instruction", {}).render(Row(PLACE, values))
    assert "".join(f"[{s.text}]" if s.trained else s.text for s in example.segments) == (
        "### System\nBe.\n\n### Instruction\nHi\n\n### Answer\n[Yes?]\n\n### Instruction\nHi\n\n### Answer\n[Yes?]"
    )


@pytest.mark.parametrize("empty", [None, math.nan, "", " ", Decimal("NaN")])
def test_what_is_empty_is_not_the_word_nan(empty: Any) -> None:
    with pytest.raises(Dropped, match="empty output"):
        render({"instruction": "Hi", "output": empty}, "instruction")
    with pytest.raises(Dropped, match="empty text"):
        render({"text": empty}, "text")
    with pytest.raises(Dropped, match="empty messages"):
        render({"messages": None if isinstance(empty, (float, Decimal)) else empty})
    with pytest.raises(Dropped, match="empty assistant turn"):
        render({"messages": [USER, {"role": "assistant", "content": empty}]})


@pytest.mark.parametrize(
    ("format", "values", "words"),
    [
        ("text", {"text": b"\xff\xfe"}, "column text"),
        ("instruction", {"instruction": "Hi", "output": b"\xff"}, "column output"),
        ("chat", {"messages": [USER, {"role": "assistant", "content": b"\xff"}]}, "column messages"),
        ("chat", {"messages": "[{"}, "column messages"),
        ("chat", {"messages": '[{"role": "user", "role": "assistant", "content": "a"}]'}, "has the key 'role' twice"),
        ("chat", {"messages": [USER, {**ANSWER, "role": ""}]}, "has no role"),
        ("chat", {"messages": [USER, ANSWER], "tools": "{"}, "column tools"),
        ("chat", {"messages": [USER, ANSWER], "tools": 5}, "column tools"),
        ("instruction", {"instruction": "Hi", "output": "Yes?", "history": ["Hi"]}, "history"),
    ],
)
def test_what_cannot_be_read_is_an_error_with_the_row_and_the_column(
    format: str, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words) as error:
        render(values, format)
    assert error.value.where == PLACE and error.value.fix


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One day", "<|begin_of_text|>[One day<|end_of_text|>]"),
        ("<|begin_of_text|>One day", "<|begin_of_text|>[One day<|end_of_text|>]"),
        ("<|begin_of_text|>One day<|end_of_text|>", "<|begin_of_text|>[One day<|end_of_text|>]"),
        ("One day<|eot_id|>\n", "<|begin_of_text|>[One day<|eot_id|>\n]"),
        ("<|start_header_id|>One", "<|begin_of_text|>[<|start_header_id|>One<|end_of_text|>]"),
    ],
)
def test_text_that_is_already_rendered_gets_no_second_token_at_either_end(text: str, expected: str) -> None:
    assert shown({"text": text}, "text", "llama-3") == expected
    renderer = Renderer(family_tokenizer("llama-3"), "text", {})
    renderer.render(Row(PLACE, {"text": text}))
    assert sum(renderer.notes.values()) == text.startswith("<|")
    assert all("special token" in note for note in renderer.notes)


def test_a_rendered_prompt_and_completion_get_no_second_token_at_either_end() -> None:
    values = {"prompt": "<|begin_of_text|>Q:", "completion": " A<|eot_id|>"}
    assert shown(values, "prompt-completion", "llama-3") == "<|begin_of_text|>Q:[ A<|eot_id|>]"


def test_the_report_has_the_hash_of_the_template() -> None:
    hashes = {name: Renderer(family_tokenizer(name), "chat", {}).template_hash() for name in ("llama-3", "qwen3")}
    assert all(len(each or "") == 16 for each in hashes.values()) and len(set(hashes.values())) == 2
    assert Renderer(family_tokenizer("qwen3"), "text", {}).template_hash() is None
