"""The tokens and the loss mask of rendered rows. The tokenizer makes each byte a token, so text shows all tokens."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from tokenizers import Regex, normalizers

from genvalues.common.errors import UserError
from llama_lora.data.chat_template import ChatTemplates
from llama_lora.data.rendering import TEMPLATE_DATE, Dropped, Renderer
from llama_lora.data.rows import Row
from llama_lora.data.tokens import IGNORED, ExampleTokenizer
from trainer.chat_templates import family_tokenizer
from trainer.conftest import CHAT_TEMPLATE, byte_tokenizer


def shown(tokenizer: Any, format: str, values: dict[str, Any], max_length: int = 1000, **columns: str) -> str:
    """Decode the row's tokens, with the trained ones in [brackets]."""
    [rendered] = Renderer(tokenizer, format, columns).render(Row("rows.jsonl:1", values))
    example, _ = ExampleTokenizer(tokenizer).example(rendered, max_length)
    assert len(example.input_ids) == len(example.labels)
    text, trained = "", False
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (IGNORED, token)
        if (label != IGNORED) != trained:
            trained = not trained
            text += "[" if trained else "]"
        text += tokenizer.decode([token])
    return text + ("]" if trained else "")


def test_only_the_answer_and_its_end_token_have_a_loss(tokenizer: Any) -> None:
    assert (
        shown(tokenizer, "instruction", {"instruction": "Add 1 and 1.", "output": "2"})
        == "<|start|>user\nAdd 1 and 1.<|end|>\n<|start|>assistant\n[2<|end|>]\n"
    )


def test_the_input_column_joins_the_question(tokenizer: Any) -> None:
    row = {"instruction": "Shorten.", "context": "A long text.", "response": "Text."}
    assert (
        shown(tokenizer, "instruction", row, input="context", output="response")
        == "<|start|>user\nShorten.\n\nA long text.<|end|>\n<|start|>assistant\n[Text.<|end|>]\n"
    )


def test_every_assistant_turn_and_no_other_has_a_loss(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Bye."},
    ]
    assert shown(tokenizer, "chat", {"messages": messages}) == (
        "<|start|>system\nBe brief.<|end|>\n<|start|>user\nHi<|end|>\n<|start|>assistant\n[Yes?<|end|>]\n"
        "<|start|>user\nBye<|end|>\n<|start|>assistant\n[Bye.<|end|>]\n"
    )


def test_text_has_a_loss_on_all_tokens_but_the_first(tokenizer: Any) -> None:
    assert shown(tokenizer, "text", {"text": "One day"}) == "<|bos|>[One day<|end|>]"


def test_prompt_and_completion_are_joined_as_written(tokenizer: Any) -> None:
    assert shown(tokenizer, "prompt-completion", {"prompt": "1+1=", "completion": "2"}) == "<|bos|>1+1=[2<|end|>]"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None])
@pytest.mark.parametrize("last", ["<|start|>", "<|bos|>", "<|end|>", "<|end|>\n"])
def test_only_a_token_that_ends_a_text_is_its_end(template: str | None, last: str) -> None:
    end = "" if "<|end|>" in last else "<|end|>"
    tokenizer = byte_tokenizer(template)
    assert shown(tokenizer, "prompt-completion", {"prompt": "1+1=", "completion": f"2{last}"}) == (
        f"<|bos|>1+1=[2{last}{end}]"
    )
    assert shown(tokenizer, "text", {"text": f"2{last}"}) == f"<|bos|>[2{last}{end}]"


def test_the_token_with_which_the_chat_template_ends_a_turn_ends_a_text() -> None:
    llama = family_tokenizer("llama-3")
    assert llama.eos_token == "<|end_of_text|>"
    for end in ("<|eot_id|>", "<|end_of_text|>"):
        assert shown(llama, "prompt-completion", {"prompt": "?", "completion": f"Yes.{end}"}).endswith(f"[Yes.{end}]")


def test_without_a_chat_template_the_documented_prompt_template_is_used() -> None:
    plain = byte_tokenizer(chat_template=None)
    assert (
        shown(plain, "instruction", {"instruction": "Add.", "input": "1 1", "output": "2"})
        == "<|bos|>### Instruction\nAdd.\n\n### Context\n1 1\n\n### Answer\n[2<|end|>]"
    )
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    assert shown(plain, "chat", {"messages": messages}) == "<|bos|>### User\nHi\n\n### Assistant\n[Yes?<|end|>]\n\n"


def test_a_template_without_an_end_token_gets_one() -> None:
    bare = byte_tokenizer("{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{% endfor %}"
                          "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    assert shown(bare, "instruction", {"instruction": "Hi", "output": "Yes?"}) == "user: Hiassistant: [Yes?<|end|>]"


def test_a_date_in_the_template_is_fixed_and_recorded() -> None:
    today = byte_tokenizer(
        "{{ strftime_now('%Y') }} {% for message in messages %}{{ message['content'] }}<|end|>{% endfor %}"
    )
    renderer = Renderer(today, "instruction", {})
    assert renderer.date() == "26 Jul 2024"
    assert shown(today, "instruction", {"instruction": "Hi", "output": "Yo"}) == "2024 Hi<|end|>[Yo<|end|>]"
    assert TEMPLATE_DATE.year != datetime.now().year
    assert Renderer(byte_tokenizer(), "instruction", {}).date() is None


def test_a_date_format_that_is_no_literal_gives_the_fixed_date_too() -> None:
    computed = byte_tokenizer(
        "{{ strftime_now('%' ~ 'Y') }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    assert shown(computed, "instruction", {"instruction": "Hi", "output": "Yo"}) == "2024Hi[Yo<|end|>]"


@pytest.mark.parametrize(
    "beginning", ["", "\n", "\n\n  ", "  ", "{%- if true %}\n  x{% endif %}", "  {# #}\n", "{{ 'x' }}\n"]
)
def test_the_fixed_date_changes_nothing_else_of_a_template(beginning: str) -> None:
    template = (
        beginning + "  {% for message in messages %}\n  {{ message['role'] }}: {{ message['content'] }}<|end|>\n"
        '  {% if strftime_now is defined %}{{- strftime_now("%d %B\\n%-d/%m") }}\n{% endif %}{% endfor %}\n'
    )
    tokenizer = byte_tokenizer(template)
    fixed = ChatTemplates(tokenizer).of([]).render([QUESTION], [], prompt=False, place="rows.jsonl:1")
    today = tokenizer.apply_chat_template([QUESTION], tokenize=False)
    dates = (TEMPLATE_DATE, datetime.now())
    assert fixed.replace(*(date.strftime("%d %B\n%-d/%m") for date in dates)) == today != fixed


def test_a_row_is_truncated_to_the_maximum_length_and_reported(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer, "prompt-completion", {})
    tokens = ExampleTokenizer(tokenizer)
    [rendered] = renderer.render(Row("x", {"prompt": "abc", "completion": "defgh"}))
    example, truncated = tokens.example(rendered, 6)
    assert (tokenizer.decode(example.input_ids), truncated) == ("<|bos|>abcde", True)
    [short] = renderer.render(Row("x", {"prompt": "a", "completion": "b"}))
    assert tokens.example(short, 6)[1] is False


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"instruction": "Hi", "output": ""}, "empty output"),
        ({"instruction": "Hi", "output": None}, "empty output"),
        ({"instruction": " ", "output": "Yes"}, "empty instruction"),
        ({"instruction": "x" * 200, "output": "Yes"}, "prompt fills maxSequenceLength"),
    ],
)
def test_a_row_without_trained_tokens_is_dropped_with_its_reason(
    tokenizer: Any, values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Dropped, match=reason):
        shown(tokenizer, "instruction", values, max_length=100)


def test_an_error_for_a_missing_column_has_the_place_and_the_available_columns(tokenizer: Any) -> None:
    with pytest.raises(UserError) as error:
        shown(tokenizer, "instruction", {"ask": "Hi", "say": "Yes"})
    assert error.value.where == "rows.jsonl:1" and "no column instruction" in str(error.value)
    assert "dataset.columns.instruction" in error.value.fix and "ask, say" in error.value.fix


@pytest.mark.parametrize("messages", [{"role": "user"}, 5, [{"content": "Hi"}], [["user", "Hi"]]])
def test_messages_of_another_shape_are_an_error(tokenizer: Any, messages: Any) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:1: column messages is not a list of messages"):
        shown(tokenizer, "chat", {"messages": messages})


def test_a_tokenizer_without_an_end_token_is_an_error() -> None:
    endless = byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(UserError, match="has no end-of-sequence token"):
        Renderer(endless, "text", {})


QUESTION = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([QUESTION], "no assistant turn"),
        ([QUESTION, {"role": "assistant", "content": ""}], "has an empty assistant turn"),
        ([QUESTION, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}], "has tool calls"),
        (
            [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}],
            "has a message without plain text",
        ),
        ([{"role": "assistant", "content": "Hello"}, QUESTION], "no assistant turn has a loss"),
        ([QUESTION, {"role": "assistant", "content": "cut \ud83d"}], "is not valid Unicode"),
    ],
)
def test_a_conversation_that_cannot_be_trained_on_is_dropped_with_its_reason(
    tokenizer: Any, messages: list[dict[str, Any]], reason: str
) -> None:
    with pytest.raises(Dropped, match=reason):
        shown(tokenizer, "chat", {"messages": messages})


# Llama 3.1's template without tools: a header with dates before the system prompt, and trimmed content.
LLAMA_3_1 = (
    "{{ '<|bos|>' }}{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start|>system\n\nCutting Knowledge Date: December 2023\nToday Date: ' + date_string }}"
    "{{ '\n\n' + system + '<|end|>' }}"
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n\n' }}{% endif %}"
)


def test_llama_3_1s_template_gives_a_fixed_date_one_begin_token_and_the_right_loss_mask() -> None:
    llama = byte_tokenizer(LLAMA_3_1)
    turns = [{"role": "system", "content": " Be brief. "}, QUESTION, {"role": "assistant", "content": " Yes? \n"}]
    assert shown(llama, "chat", {"messages": turns}) == (
        "<|bos|><|start|>system\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe brief.<|end|>"
        "<|start|>user\n\nHi<|end|><|start|>assistant\n\n[Yes?<|end|>]"
    )
    assert Renderer(llama, "chat", {}).date() == "26 Jul 2024"


def test_a_template_that_rejects_a_single_question_has_no_date() -> None:
    strict = byte_tokenizer("{% if messages | length < 2 %}{{ raise_exception('two at least') }}{% endif %}")
    assert Renderer(strict, "chat", {}).date() is None


@pytest.mark.parametrize("instead", ["", "<|end|>", "{% if not add_generation_prompt %}I see.<|end|>\n{% endif %}"])
def test_an_answer_that_the_template_leaves_out_is_not_trained_as_its_end_token_alone(instead: str) -> None:
    questions = "{% for message in messages if message['role'] == 'user' %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(Dropped, match="renders an assistant turn without its content"):
        shown(byte_tokenizer(questions + instead), "instruction", {"instruction": "Hi", "output": "The end."})


@pytest.mark.parametrize("answer", [" Yes? \n", "...", "<think>Reasons</think>Yes", "<think>Reasons</think>"])
def test_an_answer_that_the_template_trims_or_takes_apart_is_trained(answer: str) -> None:
    """As Qwen3's template does with a thought."""
    apart = CHAT_TEMPLATE.replace("message['content']", "message['content'].split('think>')[-1].strip() or 'Reasons'")
    assert "<|end|>]" in shown(byte_tokenizer(apart), "instruction", {"instruction": "Hi", "output": answer})


def test_a_tokenizer_without_tokens_is_an_error() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("."), "")
    with pytest.raises(UserError, match="gives no tokens") as error:
        ExampleTokenizer(tokenizer)
    assert error.value.where == "model" and error.value.fix


def test_a_tokenizer_that_marks_the_beginning_of_every_text_is_an_error() -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    sentencepiece = Tokenizer(models.BPE(vocab={"\u2581": 0, "a": 1, "\n": 2, "<e>": 3}, merges=[]))
    sentencepiece.normalizer = normalizers.Prepend("\u2581")
    sentencepiece.decoder = decoders.Replace("\u2581", " ")
    llama_2 = PreTrainedTokenizerFast(tokenizer_object=sentencepiece, eos_token="<e>")
    with pytest.raises(UserError, match="marks the beginning of every text"):
        Renderer(llama_2, "instruction", {})
    assert Renderer(llama_2, "text", {})
