"""The house's order: what may import what, and what must not be in it."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GENERATOR, TRAINER = ROOT / "generator/genvalues", ROOT / "trainer/llama_lora"
# Which rooms of the generator a room may import. "commands" includes cli.py, the entry point.
MAY_IMPORT: dict[str, set[str]] = {
    "common": set(),
    "accelerators": {"common"},
    "settings": {"common", "accelerators"},
    "planner": {"common", "accelerators", "settings"},
    "inputs": {"common", "accelerators", "settings", "planner"},
    "cluster": {"common", "accelerators", "settings"},
    "ops": {"common", "accelerators", "settings", "planner", "inputs", "cluster"},
    "commands": {"common", "accelerators", "settings", "planner", "inputs", "cluster", "ops"},
}
TRAINER_MAY_IMPORT = {"common", "settings", "accelerators"}
MOST_FLOORS = 8
HEAVY = {"numpy", "torch", "transformers", "peft", "datasets", "pyarrow", "safetensors", "tokenizers"}


def imports(path: Path) -> set[str]:
    """Dotted names of the modules a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_name(path: Path) -> str:
    """``genvalues.common.errors`` of its path; a package has its __init__'s."""
    parts = (
        path.relative_to(GENERATOR.parent if path.is_relative_to(GENERATOR) else TRAINER.parent).with_suffix("").parts
    )
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_graph(package: Path) -> dict[str, set[str]]:
    """Which modules of a package each of its modules imports, at any depth of the code."""
    modules = {module_name(path): path for path in package.rglob("*.py")}
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & modules.keys()
            elif isinstance(node, ast.ImportFrom) and node.module in modules:
                inner = {
                    f"{node.module}.{alias.name}" for alias in node.names
                }  # modules, or names of the package's own
                graph[name] |= inner & modules.keys() or {node.module}
    return graph


def room_of(module: str) -> str:
    parts = module.split(".")
    return "commands" if parts[1:2] in ([], ["cli"]) else parts[1]


def test_a_room_of_the_generator_imports_only_rooms_below_it() -> None:
    for module, imported in module_graph(GENERATOR).items():
        for other in imported - {"genvalues"}:  # the package itself holds only the version
            room, below = room_of(module), room_of(other)
            assert room == below or below in MAY_IMPORT[room], f"{module} imports {other}"


def test_the_rooms_have_at_most_eight_floors() -> None:
    floors: dict[str, int] = {}
    for room in MAY_IMPORT:  # from the ground up
        floors[room] = 1 + max((floors[below] for below in MAY_IMPORT[room]), default=0)
    assert max(floors.values()) <= MOST_FLOORS


@pytest.mark.parametrize("package", [GENERATOR, TRAINER], ids=["genvalues", "llama_lora"])
def test_no_module_imports_itself_through_others(package: Path) -> None:
    graph = module_graph(package)
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle of imports: {' -> '.join((*path, module))}"
        if module not in finished:
            for imported in graph[module]:
                visit(imported, (*path, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


def test_the_trainer_knows_nothing_of_kubernetes_and_imports_three_rooms_of_the_generator() -> None:
    for path in (ROOT / "trainer").rglob("*.py"):
        names = imports(path)
        assert not any(name.split(".")[0] in ("kubernetes", "pyhelm3") for name in names), path
        rooms = {name.split(".")[1] for name in names if name.startswith("genvalues.")}
        assert rooms <= TRAINER_MAY_IMPORT, f"{path} imports {rooms - TRAINER_MAY_IMPORT}"


def test_the_generator_knows_nothing_of_training() -> None:
    for path in (ROOT / "generator").rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & (HEAVY | {"llama_lora"}), path


@pytest.mark.parametrize(
    ("module", "not_imported"),
    [("genvalues.cli", {"boto3", "kubernetes", "pyhelm3", "torch"}), ("llama_lora.cli", HEAVY | {"kubernetes"})],
)
def test_a_command_imports_only_what_it_uses(module: str, not_imported: set[str]) -> None:
    """It starts where those are not installed, as in the image of tests/cluster."""
    code = (
        "import importlib.metadata, sys\n"
        f"absent = {sorted(not_imported)}\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in absent: raise ModuleNotFoundError(name)\n"
        "def distribution(name, found=importlib.metadata.distribution):\n"
        "    if name in absent: raise importlib.metadata.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "importlib.metadata.distribution = distribution\n"
        f"import {module}\n"
    )
    started = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert started.returncode == 0, started.stderr


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name]


def test_no_secret_is_committed() -> None:
    pattern = re.compile(r"hf_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}")
    files = [path for path in tracked() if path.is_file() and path.suffix not in (".gz", ".png", ".xz")]
    assert len(files) > 50
    found = [str(path) for path in files if pattern.search(path.read_text(encoding="utf-8"))]
    assert found == []


def test_the_top_level_is_what_the_card_says() -> None:
    top = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert {"chart", "generator", "trainer", "values", "tests", "pyproject.toml", "Chart.lock", "Makefile"} <= top
    assert {"README.md", "LICENSE", ".ci", "helmfile.yaml.gotmpl"} <= top


def test_ci_and_readme_name_the_same_commands() -> None:
    readme, ci = (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    named = re.findall(r"^ {4}(make \S+) +# ", readme, re.MULTILINE)
    assert sorted(named) == sorted(re.findall(r"^make .+$", ci, re.MULTILINE))
    assert {"make demo", "make test", "make test-cluster"} <= set(named)


def test_every_test_is_run_by_make_test_or_by_make_test_cluster(pytestconfig: pytest.Config) -> None:
    paths = [ROOT / path for path in pytestconfig.getini("testpaths")]
    assert not any((ROOT / "tests/cluster").is_relative_to(path) for path in paths)
    for file in (ROOT / "tests").rglob("test_*.py"):
        assert any(file.is_relative_to(path) for path in [*paths, ROOT / "tests/cluster"]), f"no command runs {file}"


def test_a_plain_install_brings_the_cards_packages_and_what_a_terminal_and_the_cluster_need() -> None:
    plain = {
        re.split(r"[<>=!~ ;\[]", wanted)[0].lower()
        for wanted in importlib.metadata.requires("llama-lora") or []
        if "extra ==" not in wanted
    }
    assert plain == {"pyhelm3", "pydantic", "pyyaml", "jsonschema", "boto3", "click", "rich", "kubernetes"}


def test_without_the_trainers_packages_its_command_says_what_to_install() -> None:
    code = (
        "import importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda n, *a: None if n == 'torch' else find(n, *a);"
        "from llama_lora.cli import main; main(['tokenize', '--config', 'run.yaml', '--workspace', '.'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "torch is not installed. Install what the stages need: pip install 'llama-lora[trainer]'.\n"


def test_the_cluster_tests_can_be_collected() -> None:
    """They run only on a cluster, where an import that fails would be found late."""
    command = [sys.executable, "-m", "pytest", "tests/cluster", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
