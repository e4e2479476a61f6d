"""neuron_parallel_compile: the flags it gets, what it prints, and how many compilers it may start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from genvalues.common.errors import UserError
from llama_lora.backends.xla import cache, tool


@pytest.mark.parametrize(
    ("set_by_user", "expected"),
    [
        ("", "--cache_dir=/w/compile-cache"),
        ("--model-type transformer -O 1", "--model-type transformer -O 1 --cache_dir=/w/compile-cache"),
        ("--cache_dir=/w/compile-cache --optlevel=2", "--optlevel=2 --cache_dir=/w/compile-cache"),
        ("--cache_dir /w/compile-cache --optlevel=2", "--optlevel=2 --cache_dir=/w/compile-cache"),
    ],
)
def test_the_cache_is_the_workspaces_and_the_users_flags_stay(set_by_user: str, expected: str) -> None:
    assert cache.flags({"NEURON_CC_FLAGS": set_by_user}, Path("/w/compile-cache")) == expected


@pytest.mark.parametrize(
    "environment",
    [{"NEURON_CC_FLAGS": "--cache_dir /elsewhere"}, {"NEURON_COMPILE_CACHE_URL": "s3://bucket/cache"}],
)
def test_another_cache_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(UserError, match="sets another cache"):
        cache.flags(environment, Path("/w/compile-cache"))


def test_a_cache_path_that_the_compiler_cannot_read_is_refused() -> None:
    with pytest.raises(UserError, match="contains a character that the Neuron compiler does not support"):
        cache.flags({}, Path("/w/v1.0/compile-cache"))


def test_the_flags_that_a_graphs_key_has_are_those_of_the_compiler() -> None:
    given = "-O 1 --cache_dir /w/c --log_level=INFO --retry_failed_compilation --no_cache --model-type=transformer"
    assert cache.compiler_flags({"NEURON_CC_FLAGS": given}) == "-O 1 --model-type=transformer"


# --- what the program says


DOCUMENTED = """\
INFO ||NEURON_CACHE||: Compile cache path: /var/tmp/neuron-compile-cache
INFO ||NEURON_CC_WRAPPER||: Extracting graphs (/c/neuronxcc-2.0.0.22266a0+a69f71e55/MODULE_197+abb26765/model.hlo.pb) \
for ahead-of-time parallel compilation. No compilation was done.
INFO ||NEURON_CC_WRAPPER||: Using a cached neff at /c/neuronxcc-2.0.0.22266a0+a69f71e55/MODULE_5+abb26765/model.neff. \
Exiting with a successfully compiled graph.
INFO: 2023-08-24 20:21:11.000895:  161136  INFO ||NEURON_PARALLEL_COMPILE||: {
INFO:     "compilation_summary": {
INFO:         "true": 1,
INFO:         "false": 1
INFO:     },
INFO:     "compilation_report": {
INFO:         "/c/neuronxcc-2.0.0.22266a0+a69f71e55/MODULE_197+abb26765/model.hlo.pb": {
INFO:             "status": true,
INFO:             "retry": 0
INFO:         },
INFO:         "/c/neuronxcc-2.0.0.22266a0+a69f71e55/MODULE_161+abb26765/model.hlo.pb": {
INFO:             "status": false,
INFO:             "retry": 1
INFO:         }
INFO:     }
INFO: }
INFO: 2023-08-24 20:21:11.000895:  161136  INFO ||NEURON_PARALLEL_COMPILE||: Total graphs: 2
INFO: 2023-08-24 20:21:11.000895:  161136  INFO ||NEURON_PARALLEL_COMPILE||: Total successful compilations: 1
INFO: 2023-08-24 20:21:11.000895:  161136  INFO ||NEURON_PARALLEL_COMPILE||: Total failed compilations: 1
"""
NEWER = """\
2025-01-17 01:16:07.000981:  32201  INFO ||NEURON_PARALLEL_COMPILE||: {
    "compilation_summary": {
        "true": 1
    },
    "compilation_report": {
        "/c/neuronxcc-2.16.372.0+4a9b2326/MODULE_999+3cc9a3cb/model.hlo_module.pb": {
            "status": true,
            "retry": 0,
            "compile_time": 9.770226240158081
        }
    },
    "start_time": 1737076558.7,
    "compilation_time": 9.8
}
2025-01-17 01:16:07.000981:  32201  INFO ||NEURON_PARALLEL_COMPILE||: Total graphs: 1
2025-01-17 01:16:07.000981:  32201  INFO ||NEURON_PARALLEL_COMPILE||: Total successful compilations: 1
2025-01-17 01:16:07.000981:  32201  INFO ||NEURON_PARALLEL_COMPILE||: Total failed compilations: 0
"""


def read(text: str) -> tool.Summary:
    summary = tool.Summary()
    for line in text.splitlines():
        summary.read_line(line)
    return summary


def test_the_documented_summary_is_read() -> None:
    summary = read(DOCUMENTED)
    version = "neuronxcc-2.0.0.22266a0+a69f71e55"
    assert summary.module_names() == {f"{version}/MODULE_197+abb26765", f"{version}/MODULE_5+abb26765"}
    assert sorted(summary.statuses.values()) == [False, True]
    assert summary.totals == {"graphs": 2, "successful compilations": 1, "failed compilations": 1}
    assert not summary.trial_failed


def test_the_summary_of_newer_versions_is_read_with_its_times() -> None:
    summary = read(NEWER)
    assert list(summary.statuses.values()) == [True] and list(summary.seconds.values()) == [9.770226240158081]
    assert summary.totals["graphs"] == 1


def test_a_printed_report_that_is_torn_apart_says_nothing_and_the_file_does() -> None:
    torn = NEWER.replace('            "retry": 0,', "Compiler status PASS\n")
    summary = read(torn)
    assert summary.statuses == {} and summary.totals["graphs"] == 1
    summary.read_report('{"compilation_report": {"/c/v/m/model.hlo_module.pb": {"status": false, "retry": 0}}}')
    assert summary.statuses == {"/c/v/m/model.hlo_module.pb": False}


def test_a_container_gets_as_many_compilers_as_fit_in_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 512 * 2**30 // 4096}.__getitem__)
    for limit, expected in ((460 * tool.GIB, 7), (16 * tool.GIB, 1), (600 * tool.GIB, None), (None, None)):
        monkeypatch.setattr(tool, "memory_limit", lambda limit=limit: limit)
        assert tool.compilers() == expected
