"""Check that an image is complete: python3 trainer/smoke_test.py '[trainer,neuron]'

Compares versions with constraints.txt, checks the packages' requirements, imports every module, and runs the commands.
Runs at the end of the image's build, so it needs no Neuron device. Prints all problems and exits with status 1.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.specifiers import SpecifierSet

import pins

OURS = "llama-lora"
IMPORTS = {
    "command": ["boto3", "click", "jsonschema", "kubernetes", "pydantic", "pyhelm3", "rich", "yaml"],
    "trainer": [
        *("torch", "transformers", "peft", "accelerate", "datasets", "gguf", "safetensors.torch", "pyarrow.parquet"),
        *("torch.utils.tensorboard", "torch.distributed.run"),
    ],
    # optimum.neuron first: without a Neuron device it sets the platform for the other imports.
    "neuron": [
        *("optimum.neuron", "torch_xla.core.xla_model", "libneuronxla", "torch_neuronx", "neuronx_distributed", "trl"),
        *("optimum.neuron.trainers", "optimum.neuron.models.training", "optimum.neuron.peft", "evaluate"),
    ],
}
COMMANDS = {
    "command": [["genvalues", "--help"], ["helm", "version", "--short"]],
    "trainer": [["llama-lora", "--help"], ["torchrun", "--help"]],
    "neuron": [],
}
ON_PATH = {"neuron": ["neuron_parallel_compile", "neuronx-cc"]}  # not run: --help of either loads the compiler
NO_DEVICE = {"NEURON_PLATFORM_TARGET_OVERRIDE": "trn1"}  # as optimum.neuron sets it (its utils/instance.py)
LIMIT = 600  # seconds for the imports of one part from a cold disk


def problems(extras: list[str], constraints: Path) -> Iterator[str]:
    """Yield all problems, one line each."""
    parts = ["command", *extras]
    yield from wrong_machine()
    yield from wrong_versions(parts, constraints)
    yield from unmet_requirements(extras, constraints)
    for part in parts:
        yield from failing_imports(part, [*IMPORTS[part], *modules_of(part)])
        for command in COMMANDS[part]:
            yield from failing_command(command)
        for name in ON_PATH.get(part, []):
            if shutil.which(name) is None:
                yield f"{name} is not on PATH"


def wrong_machine() -> Iterator[str]:
    if platform.machine() != "x86_64":
        yield f"the processor is {platform.machine()}; the Neuron libraries need x86_64"


def wrong_versions(parts: Iterable[str], constraints: Path) -> Iterator[str]:
    """Yield packages that are missing or do not have the version in constraints.txt."""
    pinned = pins.sections(constraints)
    wanted = {"neuron": ["sdk", "neuron"], "trainer": ["base", "trainer"]}
    for section in (section for part in parts for section in wanted.get(part, [part])):
        for name, version in pinned[section].items():
            installed = installed_version(name)
            if installed is None or not SpecifierSet(f"=={version}").contains(installed, prereleases=True):
                yield f"{name} is {installed or 'not installed'}; constraints.txt has {version}"


def unmet_requirements(extras: list[str], constraints: Path) -> Iterator[str]:
    """Yield requirements of llama-lora, direct or not, that are missing, of another version, or not in constraints.txt.

    Packages of the base image and their requirements are not checked.
    """
    pinned = pins.sections(constraints)
    of_base = {pins.normalized(name) for section in ("base", "sdk") for name in pinned[section]}
    pinned_names = {pins.normalized(name) for section in pinned.values() for name in section}
    seen: set[tuple[str, tuple[str, ...]]] = set()
    todo = [("the image", Requirement(f"{OURS}[{','.join(extras)}]" if extras else OURS))]
    while todo:
        dependent, wanted = todo.pop()
        name = pins.normalized(wanted.name)
        installed = installed_version(name)
        if installed is None or not wanted.specifier.contains(installed, prereleases=True):
            yield f"{dependent} needs {wanted}; {installed or 'none'} is installed"
        if installed is None or name in of_base or (name, tuple(sorted(wanted.extras))) in seen:
            continue
        seen.add((name, tuple(sorted(wanted.extras))))
        if name != OURS and name not in pinned_names:
            yield f"{name}, which {dependent} needs, is not in constraints.txt"
        for text in importlib.metadata.requires(name) or []:
            below = Requirement(text)
            if below.marker is None or any(below.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)):
                todo.append((name, below))


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def modules_of(part: str) -> list[str]:
    """List the modules of our packages that this part of the image can import."""
    package = {"command": "genvalues", "trainer": "llama_lora", "neuron": "llama_lora"}[part]
    found = importlib.util.find_spec(package)
    if found is None or found.submodule_search_locations is None:
        return [package]  # importing it reports the problem
    names = [module.name for module in walk(package, list(found.submodule_search_locations))]
    return [name for name in names if part == "command" or (".neuron" in name) == (part == "neuron")]


def walk(package: str, folders: list[str]) -> Iterator[pkgutil.ModuleInfo]:
    """Yield the modules of a package and its subpackages, without importing them."""
    for module in pkgutil.iter_modules(folders, f"{package}."):
        yield module
        if module.ispkg:
            yield from walk(module.name, [str(Path(folder) / module.name.rpartition(".")[2]) for folder in folders])


# One process for all, so that shared modules are imported once. It prints a line before each import, to name a crash.
IMPORTER = """
import importlib, sys
for name in sys.argv[1:]:
    print("importing", name, flush=True)
    try:
        importlib.import_module(name)
    except BaseException as error:
        said = " ".join(str(error).split())[:300]
        print("failed", name, type(error).__name__ + (": " + said if said else ""), flush=True)
print("done", flush=True)
"""


def failing_imports(part: str, names: list[str]) -> Iterator[str]:
    environment = dict(os.environ)
    if part == "neuron" and not list(Path("/dev").glob("neuron[0-9]*")):
        environment = {**NO_DEVICE, **environment}
    with tempfile.TemporaryFile("w+") as output:  # not a pipe: a library's background process may keep it open
        command = [sys.executable, "-c", IMPORTER, *names]
        try:
            ended = subprocess.run(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=LIMIT, check=False
            )
            how = f"exits with status {ended.returncode}"
        except subprocess.TimeoutExpired:
            how = f"takes more than {LIMIT} seconds"
        output.seek(0)
        lines = output.read().splitlines()
    for line in lines:
        if line.startswith("failed "):
            _, name, error = line.split(" ", 2)
            yield f"import {name}: {error}"
    if "done" not in lines:
        last = next((line.split()[1] for line in reversed(lines) if line.startswith("importing ")), "of anything")
        yield f"import {last}: {how}: {' '.join(lines[-1:])[:300]}"


def failing_command(command: list[str]) -> Iterator[str]:
    shown = " ".join(command)
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    except OSError as error:
        yield f"{shown}: {error.strerror}"
    except subprocess.TimeoutExpired:
        yield f"{shown}: takes more than {LIMIT} seconds"
    else:
        if ended.returncode:
            said = (ended.stderr.strip() or ended.stdout.strip() or "no output").splitlines()[-1]
            yield f"{shown}: exits with status {ended.returncode}: {said[:300]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Check that this image is complete.")
    parser.add_argument(
        "extras",
        nargs="?",
        default="[trainer,neuron]",
        help="the extras that the image was built with, such as '[trainer]'",
    )
    parser.add_argument("--constraints", type=Path, default=pins.CONSTRAINTS)
    given = parser.parse_args()
    extras = pins.extras_of(given.extras)
    if unknown := [name for name in extras if name not in IMPORTS]:
        parser.error(f"unknown extra: {', '.join(unknown)}")
    found = list(problems(extras, given.constraints))
    if found:
        print(f"The image is not complete ({len(found)} problems):", *found, sep="\n  ", file=sys.stderr)
        return 1
    print(f"The image is complete: {', '.join(['command', *extras])}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
