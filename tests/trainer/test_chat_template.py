"""Chat templates as programs: the same output as transformers', limits for hostile ones, and the time of long rows."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from genvalues.common.errors import UserError
from llama_lora import limits
from llama_lora.cli import main
from llama_lora.data import chat_template, preparation, tokenized_dataset
from llama_lora.data.chat_template import ChatTemplates
from llama_lora.data.rendering import Dropped, Renderer
from llama_lora.data.rows import Row
from llama_lora.data.tokens import ExampleTokenizer
from llama_lora.data.turns import TurnRenderer
from trainer.chat_templates import FAMILIES, family_tokenizer
from trainer.conftest import CHAT_TEMPLATE, Run, byte_tokenizer, make_model
from trainer.test_masks import CONVERSATIONS, SYSTEM, THOUGHTS, TOOL, assistant, user

QUESTION = {"instruction": "Hi", "output": "Yes?"}
HUGE = "{% set x = ('e' * 1000000) | int(base=16) %}"  # an integer of four million bits


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("prompt", [False, True])
def test_a_template_renders_as_in_transformers(name: str, prompt: bool) -> None:
    tokenizer = family_tokenizer(name)
    messages = THOUGHTS[:3] if name in ("qwen3", "gpt-oss") else CONVERSATIONS["more"]
    tools = [TOOL] if name.startswith(("qwen", "llama-3.1")) else []
    theirs = tokenizer.apply_chat_template(
        messages, tools=tools or None, tokenize=False, add_generation_prompt=prompt, date_string="26 Jul 2024"
    )
    renderer = Renderer(tokenizer, "chat", {})
    read = [
        {**each, "thinking": each["reasoning_content"]} if "reasoning_content" in each else each for each in messages
    ]
    ours = renderer._templates.of(tools).render(read, tools, prompt=prompt, place="rows.jsonl:1")
    if name == "granite":  # transformers formats today's date
        assert "July 26, 2024" in ours
        ours, theirs = (text.partition("<|end_of_text|>")[2] for text in (ours, theirs))
    assert ours == theirs


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", ["seconds"]),
        ("{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}", ["pieces"]),
        ("{{ messages | length // (messages | length - messages | length) }}", ["ZeroDivisionError"]),
        ("{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}", ["RecursionError"]),
        ("{% set ns = namespace(text='ab') %}{% for n in range(60) %}{% set ns.text = ns.text ~ ns.text %}{% endfor %}",
         ["memory"]),
        ("{{ (messages | length + 7) ** 9999999999 }}", ["OverflowError"]),
        ("{% set ns = namespace(n=9) %}{% for a in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
         ["OverflowError"]),
        ("{{ 1 | round(-3000000000) }}", ["OverflowError"]),
        ("{{ 1.5 | round(3000000000, 'floor') }}", ["OverflowError"]),
        (f"{HUGE}{{{{ ('f' * 2000000) | int(base=16) // x }}}}", ["OverflowError"]),
        (f"{HUGE}{{{{ ('f' * 2000000) | int(base=16) % x }}}}", ["OverflowError"]),
        (f"{HUGE}{{{{ ('f' * 2000000) | int(base=16) is divisibleby(x) }}}}", ["OverflowError"]),
        ("{% set many = range(1000) | list %}{% set x = ([many] * 10000) | sum(start=[]) %}", ["seconds"]),
        ("{% set x = 'ab' * (99999999999 + messages | length) %}", ["memory"]),
        ("{{ 'x' | center(99999999999) }}", ["memory"]),
        ("{{ messages | map('nothing') | list }}", ["chat template"]),
        ("{% include 'other' %}", ["model", "chat template", "include", "line 1"]),
        ("{% import 'other' as x %}", ["model", "chat template", "import"]),
        ("{% from 'other' import x %}", ["model", "chat template", "import"]),
        ("{% extends 'other' %}", ["model", "chat template", "extends"]),
        ("{{ messages + 1 }}", ["TypeError"]),
        ("{{ messages.nothing.at_all }}", ["no attribute"]),
        ("{{ 'a' * 2 if messages else x }}" + " " * 300_000, ["model", "characters"]),
        ("{% set ns = namespace(l=[1]) %}{% for i in range(9999) %}{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l }}",
         ["RecursionError"]),
    ],
    ids=["endless", "endless-output", "division", "recursion", "doubling", "power", "product", "round",
         "round-floor", "quotient", "remainder", "divisibleby", "sum", "repeat", "center",
         "filter", "include", "import", "from-import", "extends", "type", "undefined", "long", "nesting"],
)  # fmt: skip
def test_a_hostile_template_is_an_error_with_the_row_in_bounded_time_and_memory(
    monkeypatch: pytest.MonkeyPatch, template: str, words: list[str]
) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.5)
    monkeypatch.setattr(chat_template, "PIECES", 100_000)
    monkeypatch.setattr(limits, "MEMORY", 2**28)
    before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="chat template") as error:
        Renderer(byte_tokenizer(template), "instruction", {}).render(Row("rows.jsonl:7", QUESTION))
    assert error.value.where in ("rows.jsonl:7", "model")
    assert error.value.fix
    assert all(word in str(error.value) for word in words)
    assert time.process_time() - before[0] < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before[1] < 2**28 / 1024 * 1.5
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0) and signal.getsignal(signal.SIGVTALRM) == signal.SIG_DFL


@pytest.mark.parametrize("template", ["{% for %}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ x"])
def test_an_invalid_template_is_an_error_of_the_model_before_the_first_row(
    monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(limits, "MEMORY", 2**28)
    with pytest.raises(UserError, match="chat template") as error:
        Renderer(byte_tokenizer(template), "chat", {})
    assert error.value.where == "model"


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("hostile", "needs"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "0.5 seconds"),
        ("{% set x = 'ab' * (99999999999 + messages | length) %}", "2 GiB of memory"),
    ],
    ids=["endless", "memory"],
)
def test_tokenize_ends_with_status_2_and_the_row_that_a_template_is_hostile_to(
    new_run: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
    hostile: str,
    needs: str,
) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.5)
    monkeypatch.setattr(preparation, "BATCH_ROWS", 4)
    monkeypatch.setattr(preparation, "BATCHES_IN_PROCESS", 1)
    monkeypatch.setattr(tokenized_dataset, "available_cores", lambda: processes)
    byte_tokenizer(
        "{% if '30 + 30' in messages[0].content %}" + hostile + "{% endif %}" + CHAT_TEMPLATE
    ).save_pretrained(make_model(tmp_path / "model"))
    run = new_run()
    run.config["model"]["path"] = str(tmp_path / "model")
    said = run("tokenize", status=2)
    assert f"rows.jsonl:31: the chat template takes more than {needs}" in said


@pytest.mark.parametrize("processes", [1, 2])
def test_an_operation_that_cannot_be_interrupted_ends_tokenize_with_status_2_and_the_row(
    new_run: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    processes: int,
) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.5)
    monkeypatch.setattr(limits, "END_SECONDS", 1.0)  # in a fork: it would end the tests
    monkeypatch.setattr(preparation, "BATCH_ROWS", 4)
    monkeypatch.setattr(preparation, "BATCHES_IN_PROCESS", 1)
    monkeypatch.setattr(tokenized_dataset, "available_cores", lambda: processes)
    equal = (
        "{% set ns = namespace(a=[1], b=[1]) %}{% for n in range(50) %}"
        "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}"
    )
    byte_tokenizer("{% if '30 + 30' in messages[0].content %}" + equal + "{% endif %}" + CHAT_TEMPLATE).save_pretrained(
        make_model(tmp_path / "model")
    )
    run = new_run()
    run.config["model"]["path"] = str(tmp_path / "model")
    command = ["tokenize", "--config", str(run.write_config()), "--workspace", str(run.workspace)]
    fork = os.fork()
    if not fork:  # which ends in the middle of an operation
        try:
            main(command)
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 1)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == 2
    said = capfd.readouterr().err
    assert said.splitlines()[-1].startswith("/") and said.count("takes more than") == 1
    assert "rows.jsonl:31: the chat template takes more than 0.5 seconds" in said


def test_limits_within_limits_leave_the_time_of_the_row() -> None:
    with chat_template.limits("rows.jsonl:1"):
        with chat_template.limits("model"):  # a second template, which the row needs, is compiled
            pass
        assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0


def test_a_template_that_cannot_take_the_row_drops_it_with_the_templates_words() -> None:
    picky = byte_tokenizer("{{ raise_exception('Conversation roles must alternate') }}")
    with pytest.raises(Dropped, match="roles must alternate"):
        Renderer(picky, "instruction", {}).render(Row("rows.jsonl:1", QUESTION))


def test_a_tokenizer_with_two_templates_uses_the_one_for_tools_where_there_are_tools() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": "{{ tools[0].name }}" + CHAT_TEMPLATE}
    templates = ChatTemplates(tokenizer)
    assert "tools" in templates.of([{"name": "add"}]).source and "tools" not in templates.of([]).source
    tokenizer.chat_template = {"rag": CHAT_TEMPLATE}
    with pytest.raises(UserError, match="chat template"):
        Renderer(tokenizer, "chat", {})


LONG = [turn for n in range(500) for turn in (user(f"Question {n}? " * 5), assistant(f"Answer {n}. " * 20))]
AGENT = [
    user("Go."),
    *(turn for n in range(500) for turn in (assistant(f"Step {n}."), {"role": "tool", "content": "ok"})),
]


CASES = {
    "chat": (LONG, FAMILIES.keys()),
    "agent": (AGENT, FAMILIES.keys() - {"gemma", "deepseek-r1"}),  # these templates know no tools
    "system": ([SYSTEM, *LONG], FAMILIES.keys() - {"gemma"}),
}


@pytest.mark.parametrize(("case", "name"), [(case, name) for case in CASES for name in sorted(CASES[case][1])])
def test_a_conversation_of_a_thousand_turns_takes_less_than_five_seconds(case: str, name: str) -> None:
    messages = CASES[case][0]
    renderer = Renderer(family_tokenizer(name), "chat", {})
    start = time.process_time()
    examples = renderer.render(Row("rows.jsonl:1", {"messages": messages}))
    assert time.process_time() - start < 5
    answers = [segment.text for example in examples for segment in example.segments if segment.trained]
    assert len(answers) == 500 and "499." in answers[-1]


# Templates for which a window does not tell what the whole conversation gives.
COUNTING = "{% for message in messages %}{{ loop.index }} {{ message.role }}: {{ message.content }}<|end|>{% endfor %}"
USERS = "{% set users = messages | selectattr('role', 'equalto', 'user') | list | length %}"
REWRITING = USERS + "{{ users }}" + CHAT_TEMPLATE
AT_THE_END = USERS + "{% if users > 25 %}long{% endif %}" + CHAT_TEMPLATE


@pytest.mark.parametrize(
    "template", [COUNTING, REWRITING, AT_THE_END, *(family.template for family in FAMILIES.values())]
)
def test_a_long_conversation_gives_what_a_rendering_in_full_gives(
    monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    renderer = Renderer(byte_tokenizer(template), "chat", {})
    thoughts = [{**turn, "reasoning_content": "Hm."} if n % 7 == 1 else turn for n, turn in enumerate(LONG[:60])]
    row = Row("rows.jsonl:1", {"messages": thoughts})
    tokens = ExampleTokenizer(renderer.tokenizer)
    found = tokens.tokenize(renderer.render(row))
    monkeypatch.setattr(TurnRenderer, "_in_windows", lambda *arguments: None)
    assert found == tokens.tokenize(renderer.render(row))


def test_the_examples_of_a_long_rewritten_conversation_share_the_segments_of_their_history() -> None:
    """So that a tokenizer need not read the history again for each turn."""
    examples = Renderer(family_tokenizer("qwen3"), "chat", {}).render(Row("rows.jsonl:1", {"messages": LONG}))
    texts = {id(segment.text): segment.text for example in examples for segment in example.segments}
    assert sum(map(len, texts.values())) < 5 * sum(len(message["content"]) for message in LONG)
