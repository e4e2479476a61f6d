"""Check that an image is complete: python3 trainer/smoke_test.py native '[trainer]'

Compares versions with the backend's constraints file, checks the packages' requirements, imports every module, runs the
commands, and on backend native computes a gradient on the CPU. Runs at the end of the image's build, so it needs no
Neuron device. Prints all problems and exits with status 1.
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

import base_image
import pins

OURS = "llama-lora"
TRAINER_IMPORTS = [
    *("torch", "transformers", "peft", "accelerate", "datasets", "gguf", "safetensors.torch", "pyarrow.parquet"),
    *("torch.utils.tensorboard", "torch.distributed.run"),
]
IMPORTS = {
    "command": ["boto3", "click", "jsonschema", "kubernetes", "pydantic", "pyhelm3", "rich", "yaml"],
    "trainer": TRAINER_IMPORTS,
    "trainer-xla": TRAINER_IMPORTS,
    # optimum.neuron first: without a Neuron device it sets the platform for the other imports.
    "xla": [
        *("optimum.neuron", "torch_xla.core.xla_model", "libneuronxla", "torch_neuronx", "neuronx_distributed", "trl"),
        *("optimum.neuron.trainers", "optimum.neuron.models.training", "optimum.neuron.peft", "evaluate"),
    ],
}
COMMANDS = {
    "command": [["genvalues", "--help"], ["helm", "version", "--short"]],
    "trainer": [["llama-lora", "--help"]],
    "trainer-xla": [["llama-lora", "--help"], ["torchrun", "--help"]],
}
# The sections of the constraints files that belong to an extra.
SECTIONS = {"command": ["build", "command"], "trainer": ["base", "trainer"], "trainer-xla": ["base", "trainer-xla"]}
SECTIONS["xla"] = ["sdk", "xla"]
ON_PATH = {"xla": ["neuron_parallel_compile", "neuronx-cc"]}  # not run: --help of either loads the compiler
NO_DEVICE = {"NEURON_PLATFORM_TARGET_OVERRIDE": "trn1"}  # as optimum.neuron sets it (its utils/instance.py)
LIMIT = 600  # seconds for the imports of one part from a cold disk
Pinned = dict[str, dict[str, pins.Pin]]

# A model of two layers with LoRA: forward, and backward to the adapter.
GRADIENT = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules=["q_proj", "v_proj"]))
rows = torch.arange(16).reshape(2, 8)
model(input_ids=rows, labels=rows).loss.backward()
norm = sum(of.grad.square().sum() for of in model.parameters() if of.grad is not None).sqrt().item()
assert 0 < norm < float("inf"), f"the norm of the adapter's gradient is {norm}"
"""


def problems(backend: str, extras: list[str], constraints: Path) -> Iterator[str]:
    """Yield all problems, one line each."""
    parts = ["command", *extras]
    pinned = pins.sections(constraints)
    yield from wrong_machine()
    yield from wrong_versions(parts, pinned)
    yield from unmet_requirements(extras, pinned)
    if backend == "native" and base_image.RECORD.exists():
        yield from base_image.changes(base_image.RECORD.read_text(encoding="utf-8"))
    for part in parts:
        yield from failing_imports(part, [*IMPORTS[part], *modules_of(part)])
        for command in COMMANDS.get(part, []):
            yield from failing_command(command)
        for name in ON_PATH.get(part, []):
            if shutil.which(name) is None:
                yield f"{name} is not on PATH"
    if "trainer" in extras:
        yield from base_image.xla_libraries()
        yield from failing_command([sys.executable, "-c", GRADIENT], "a gradient on the CPU")


def wrong_machine() -> Iterator[str]:
    if platform.machine() != "x86_64":
        yield f"the processor is {platform.machine()}; the Neuron libraries need x86_64"


def wrong_versions(parts: Iterable[str], pinned: Pinned) -> Iterator[str]:
    """Yield packages that are missing or do not have the version in the constraints file."""
    for section in (section for part in parts for section in SECTIONS[part]):
        for pin in pinned.get(section, {}).values():
            installed = installed_version(pin.name)
            if installed is None or not SpecifierSet(pin.specifier).contains(installed, prereleases=True):
                yield f"{pin.name} is {installed or 'not installed'}; the constraints file has {pin.version}"


def unmet_requirements(extras: list[str], pinned: Pinned) -> Iterator[str]:
    """Yield requirements of llama-lora, direct or not, that are missing, of another version, or not pinned.

    Packages of the base image and their requirements are not checked.
    """
    of_base = {name for section in ("base", "sdk") for name in pinned.get(section, {})}
    pinned_names = {name for section in pinned.values() for name in section}
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
            yield f"{name}, which {dependent} needs, is not in the constraints file"
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
    package = "genvalues" if part == "command" else "llama_lora"
    found = importlib.util.find_spec(package)
    if found is None or found.submodule_search_locations is None:
        return [package]  # importing it reports the problem
    names = [module.name for module in walk(package, list(found.submodule_search_locations))]
    if part == "command":
        return names
    if part == "xla":
        return [name for name in names if in_backend(name, "xla")]
    # The engine of backend native needs the torch of its own image.
    other = ("native", "xla") if part == "trainer-xla" else ("xla",)
    return [name for name in names if not in_backend(name, *other)]


def in_backend(module: str, *folders: str) -> bool:
    return any(f"{module}.".startswith(f"llama_lora.backends.{folder}.") for folder in folders)


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
    if part == "xla" and not list(Path("/dev").glob("neuron[0-9]*")):
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


def failing_command(command: list[str], shown: str = "") -> Iterator[str]:
    shown = shown or " ".join(command)
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
    parser.add_argument("backend", choices=pins.EXTRAS, help="the target that the image was built from")
    parser.add_argument(
        "extras", nargs="?", help="the extras that the image was built with. Default: [trainer] or [trainer-xla,xla]"
    )
    parser.add_argument("--constraints", type=Path, help="default: constraints-BACKEND.txt beside this file")
    given = parser.parse_args()
    extras = pins.extras_of(pins.EXTRAS[given.backend] if given.extras is None else given.extras)
    if unknown := [name for name in extras if name not in pins.extras_of(pins.EXTRAS[given.backend])]:
        parser.error(f"unknown extra of backend {given.backend}: {', '.join(unknown)}")
    found = list(problems(given.backend, extras, given.constraints or pins.constraints(given.backend)))
    if found:
        print(f"The image is not complete ({len(found)} problems):", *found, sep="\n  ", file=sys.stderr)
        return 1
    print(f"The image is complete: {', '.join(['command', *extras])}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
