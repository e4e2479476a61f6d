"""Real text that every machine has: questions and answers from the docstrings of Python's standard library."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType

from genvalues.common import files

# Importing these opens a browser, prints a poem, or requires a display.
NOT_IMPORTED = {"antigravity", "this", "idlelib", "turtledemo", "turtle", "tkinter", "lib2to3", "test", "__main__"}
SHORTEST_ANSWER = 20  # characters; shorter docstrings say nothing
LONGEST_ANSWER = 600  # a longer one would not fit into the demo's rows of 256 tokens


def question_rows() -> list[dict[str, str]]:
    """Return {"question", "answer"} rows, deduplicated by answer, in a stable order."""
    answers: dict[str, str] = {}
    for module in standard_modules():
        for name, docstring in documented(module):
            if SHORTEST_ANSWER <= len(docstring) <= LONGEST_ANSWER:
                answers.setdefault(docstring, name)
    return [{"question": f"What does `{name}` do in Python?", "answer": answer} for answer, name in answers.items()]


def standard_modules() -> Iterator[ModuleType]:
    """Yield the public modules of the standard library that this machine can import, by name."""
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in NOT_IMPORTED:
            continue
        module = import_quietly(name)
        if module is None:
            continue
        yield module
        for found in sorted(pkgutil.iter_modules(getattr(module, "__path__", [])), key=lambda found: found.name):
            if not found.name.startswith("_") and found.name not in NOT_IMPORTED:
                submodule = import_quietly(f"{name}.{found.name}")
                if submodule is not None:
                    yield submodule


def import_quietly(name: str) -> ModuleType | None:
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except (ImportError, AttributeError, OSError, SystemExit):
            return None  # not built here, or only for another system


def documented(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, docstring) of the functions, classes and methods that the module defines."""
    for name, member in sorted(vars(module).items()):
        if name.startswith("_") or getattr(member, "__module__", None) != module.__name__:
            continue
        if not (inspect.isroutine(member) or inspect.isclass(member)):
            continue
        yield from docstring_of(f"{module.__name__}.{name}", member)
        if inspect.isclass(member):
            for method_name, method in sorted(vars(member).items()):
                if not method_name.startswith("_") and inspect.isroutine(method):
                    yield from docstring_of(f"{module.__name__}.{name}.{method_name}", method)


def docstring_of(name: str, member: object) -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some members warn that they are deprecated
        docstring = getattr(member, "__doc__", None)
    if isinstance(docstring, str):
        yield name, re.sub(r" at 0x[0-9a-f]+", "", inspect.cleandoc(docstring))  # addresses differ between runs


def write_rows(path: Path) -> int:
    """Write the rows as JSON lines and return their number. An unchanged file is not rewritten."""
    rows = question_rows()
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        files.write_text(path, text)
    return len(rows)
