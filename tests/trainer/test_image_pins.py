"""The image's Dockerfile and its pins: complete, exact and compatible. No network access."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.specifiers import SpecifierSet

from trainer.image_pins import PYTHON, RECORD, drop_unused_extras

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parents[2]
TRAINER = ROOT / "trainer"
DOCKERFILE = TRAINER / "Dockerfile"
EXTRAS = "[trainer,neuron]"
SMOKE_TEST = [sys.executable, str(TRAINER / "smoke_test.py")]
# The environment of the image's Python. Debian's, in the cluster tests, is 3.11.
ENVIRONMENT = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.12", "sys_platform": "linux"}
ENVIRONMENT |= {"platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
ENVIRONMENT |= {"implementation_name": "cpython", "platform_python_implementation": "CPython"}


def pins_module() -> Any:
    """Import trainer/pins.py, a script of the image that is not in a package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TRAINER))
        import pins
    return pins


pins = pins_module()
SECTIONS: dict[str, dict[str, str]] = pins.sections()
BY_NAME = {pins.normalized(name): version for section in SECTIONS.values() for name, version in section.items()}
OF_THE_BASE = {pins.normalized(name) for section in ("base", "sdk") for name in SECTIONS[section]}
RECORDED: dict[str, dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def ours(*extras: str) -> list[Requirement]:
    optional = [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return [Requirement(line) for line in [*PROJECT["dependencies"], *optional]]


def closure(requirements: list[Requirement]) -> dict[str, list[Requirement]]:
    """Map all packages that these need, directly or not, to their requirements, without those of the base image."""
    asked: dict[str, list[Requirement]] = {}
    seen: set[str] = set()
    todo = list(requirements)
    while todo:
        wanted = todo.pop()
        name = pins.normalized(wanted.name)
        asked.setdefault(name, []).append(wanted)
        if name in OF_THE_BASE or name not in RECORDED or str(wanted) in seen:
            continue
        seen.add(str(wanted))
        for line in RECORDED[name]["requires"]:
            below = Requirement(line)
            extras = ("", *wanted.extras)
            if below.marker is None or any(below.marker.evaluate({**ENVIRONMENT, "extra": one}) for one in extras):
                todo.append(below)
    return asked


NEEDED = closure(ours("trainer", "neuron"))


def test_every_required_package_is_pinned() -> None:
    assert len(NEEDED) > 80
    assert sorted(set(NEEDED) - set(BY_NAME)) == []


def test_every_pinned_package_is_required() -> None:
    of_torch_neuronx = {"torch-xla"}
    assert sorted(set(BY_NAME) - set(NEEDED) - OF_THE_BASE - of_torch_neuronx) == []


@pytest.mark.parametrize("name", sorted(NEEDED))
def test_a_pin_meets_all_requirements(name: str) -> None:
    for wanted in NEEDED[name]:
        assert wanted.specifier.contains(BY_NAME[name], prereleases=True), f"{wanted}, and {BY_NAME[name]} is pinned"


def test_each_section_is_complete_without_the_next() -> None:
    """Images without extras, and for the CPU, install only their sections."""
    there = set(OF_THE_BASE)
    for section, extras in (("command", ()), ("trainer", ("trainer",)), ("neuron", ("trainer", "neuron"))):
        there |= {pins.normalized(name) for name in SECTIONS[section]}
        assert set(closure(ours(*extras))) <= there, section


def test_the_recorded_requirements_of_the_pins_are_up_to_date() -> None:
    """If not, run: python tests/trainer/image_pins.py"""
    of_pypi = {pins.normalized(name): v for key, of in SECTIONS.items() if key != "sdk" for name, v in of.items()}
    assert {name: of["version"] for name, of in RECORDED.items()} == of_pypi
    before = json.dumps(RECORDED)
    drop_unused_extras(RECORDED)
    assert json.dumps(RECORDED) == before


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_a_pin_has_a_wheel_for_the_images_python(name: str) -> None:
    of = RECORDED[name]
    python, abi, platform = of["wheel"].removesuffix(".whl").split("-")[-3:]
    assert SpecifierSet(of["python"]).contains(f"{PYTHON}.12")
    stable = abi == "abi3" and int(python.removeprefix("cp3")) <= 10
    assert {"py3", "py310", "cp310"} & set(python.split(".")) or stable
    glibc = [int(minor) for minor in re.findall(r"manylinux_2_(\d+)_x86_64", platform)]
    assert platform == "any" or "manylinux2014_x86_64" in platform or min(glibc, default=99) <= 35


def test_the_pins_of_the_neuron_stack_are_those_of_optimum_neuron() -> None:
    """Its extras training and neuronx, version 0.4.5."""
    expected = {
        "accelerate": "1.8.1",
        "libneuronxla": "2.2.12677.0",
        "neuronx-cc": "2.21.33363.0",
        "neuronx-distributed": "0.15.22404",
        "optimum-neuron": "0.4.5",
        "peft": "0.17.0",
        "torch": "2.8.0",
        "torch-neuronx": "2.8.0.2.10.16998",
        "trl": "0.24.0",
    }
    assert {name: BY_NAME[name] for name in expected} == expected
    assert BY_NAME["transformers"].startswith("4.57.")
    assert SpecifierSet(">=1.22.2,<=1.26.4").contains(BY_NAME["numpy"])
    assert SpecifierSet(">=3.20.3,<4").contains(BY_NAME["protobuf"])


@pytest.mark.parametrize(
    "wrong", ["torch>=2.8", "torch", "torch==2.8.0 # why", "torch==2.8.*", "a==1\nA==2", "a_b==1\nA-b==1"]
)
def test_a_pin_that_is_not_exact_is_an_error(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "constraints.txt").write_text(f"# [base]\n{wrong}\n")
    with pytest.raises(ValueError, match="write each package once"):
        pins.sections(tmp_path / "constraints.txt")


def test_pip_never_installs_packages_of_the_base_image() -> None:
    for extras in ("", "[trainer]", EXTRAS):
        done = subprocess.run([sys.executable, TRAINER / "pins.py", extras], capture_output=True, text=True, check=True)
        given = {pins.normalized(line.partition("==")[0]) for line in done.stdout.splitlines()}
        assert len(given) > 30 and not given & OF_THE_BASE
        assert not any(name.startswith(("nvidia", "triton", "torchvision")) for name in given)


# --- the Dockerfile


def instructions() -> list[tuple[str, str]]:
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(found[1], found[2]) for found in re.finditer(r"^([A-Z]+) (.*)$", whole, re.MULTILINE)]


def test_every_install_is_without_dependencies() -> None:
    runs = [text for kind, text in instructions() if kind == "RUN"]
    installs = re.findall(r"pip install [^&;]*", " ".join(runs))
    assert len(installs) == 3
    assert all("--no-deps" in install and "--no-cache-dir" in install for install in installs)
    aws = [install for install in installs if "sdk.txt" in install]
    assert len(aws) == 1 and "--index-url https://pip.repos.neuron.amazonaws.com " in aws[0]


def test_no_system_package_and_no_kernel_module_is_installed() -> None:
    text = " ".join(text for _, text in instructions())
    assert not re.search(r"\b(apt|apt-get|dpkg|yum|dnf|dkms|modprobe|insmod|sudo)\b", text)


def test_no_secret_can_get_into_a_layer() -> None:
    for kind, text in instructions():
        if kind in ("ARG", "ENV"):
            assert not re.search(r"(?i)token|secret|passw|credential|key|auth", text), text
        assert "--mount=type=secret" not in text
        if kind in ("ADD", "COPY"):
            assert not text.startswith((". ", "./ ", "* ", "/")), text
    assert not any(kind == "ADD" for kind, _ in instructions())


def test_the_context_is_what_the_dockerfile_copies() -> None:
    """A build sends nothing else: no inputs files, keys or environments."""
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ignore[0] == "*"
    let_in = {line[1:] for line in ignore if line.startswith("!")}
    copied = {part for kind, text in instructions() if kind == "COPY" for part in text.split()[:-1]}
    assert all(any(Path(part).is_relative_to(one) for one in let_in) for part in copied)
    assert all(any(Path(part).is_relative_to(one) for part in copied) for one in let_in)


def test_the_last_user_is_not_root_and_runs_the_smoke_test() -> None:
    order = [(kind, text) for kind, text in instructions() if kind in ("USER", "RUN")]
    users = [place for place, (kind, _) in enumerate(order) if kind == "USER"]
    assert order[users[-1]] == ("USER", "1000:1000")
    assert [text for kind, text in order[users[-1] :] if kind == "RUN"] == [
        'HOME=/tmp PYTHONDONTWRITEBYTECODE=1 python3 trainer/smoke_test.py "${EXTRAS}"'
    ]


def test_dependencies_come_before_sources() -> None:
    """A change of the sources rebuilds no large layer, and a change of labels rebuilds none."""
    text = [f"{kind} {text}" for kind, text in instructions()]
    at = [next(place for place, line in enumerate(text) if word in line) for word in ("pins.txt", "COPY generator gen")]
    assert at == sorted(at)
    assert text[-1].startswith("LABEL ") and text[-2].startswith("ARG ")


def test_the_labels_describe_the_image() -> None:
    labels = next(text for kind, text in instructions() if kind == "LABEL")
    named = set(re.findall(r"org\.opencontainers\.image\.([a-z.]+)=", labels))
    assert named == {"title", "description", "licenses", "version", "revision", "base.name"}


def test_the_build_fails_first_on_another_processor() -> None:
    first = next(text for kind, text in instructions() if kind == "RUN")
    assert "uname -m" in first and "x86_64" in first and "exit 1" in first


# --- the smoke test


def freeze(folder: Path, **changed: str) -> Path:
    """Write a constraints file with the versions of this environment."""
    import importlib.metadata

    there = {pins.normalized(of.metadata["Name"]): of.version for of in importlib.metadata.distributions()} | changed
    there.pop("llama-lora")
    lines = [f"{name}=={version}" for name, version in there.items() if name != "torch"]
    file = folder / "constraints.txt"
    file.write_text(
        "\n".join(["# [base]", f"torch=={there['torch']}", "# [sdk]", "# [command]", *lines, "# [trainer]"])
    )
    return file


def smoke_test(*arguments: str | Path, path: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path, "HOME": "/tmp"}
    command = [*SMOKE_TEST, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_complete_image_passes(tmp_path: Path) -> None:
    done = smoke_test("[trainer]", "--constraints", freeze(tmp_path), path=str(Path(sys.executable).parent))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "The image is complete: command, trainer.\n"


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    helm = tmp_path / "helm"
    helm.write_text("#!/bin/sh\necho Error: no such chart >&2\nexit 1\n")
    helm.chmod(0o755)
    (tmp_path / "genvalues").write_text("#!/bin/sh\n")
    (tmp_path / "genvalues").chmod(0o755)
    file = freeze(tmp_path, peft="0.16.0", **{"no-such-package": "1.0"})
    file.write_text(file.read_text().replace(f"idna=={version('idna')}\n", ""))
    done = smoke_test("", "--constraints", file, path=str(tmp_path))
    assert done.returncode == 1 and done.stdout == ""
    first, *rest = done.stderr.splitlines()
    assert first == f"The image is not complete ({len(rest)} problems):"
    peft = f"  peft is {version('peft')}; constraints.txt has 0.16.0"
    assert {peft, "  no-such-package is not installed; constraints.txt has 1.0"} <= set(rest)
    assert "  helm version --short: exits with status 1: Error: no such chart" in rest
    assert any(re.fullmatch(r"  idna, which \S+ needs, is not in constraints.txt", line) for line in rest)
    assert not any("genvalues" in line for line in rest)


def version(name: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(name)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise RuntimeError('no\\n  device')", "import broken: RuntimeError: no device"),
        ("raise SystemExit(3)", "import broken: SystemExit: 3"),
        ("import os; os.abort()", "import broken: exits with status -6: importing broken"),
        ("import no_such_module", "import broken: ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_an_import_that_fails_or_crashes_is_reported_by_name(tmp_path: Path, body: str, said: str) -> None:
    (tmp_path / "broken.py").write_text(body)
    code = "import smoke_test; print(*smoke_test.failing_imports('command', ['json', 'broken', 'csv']), sep='\\n')"
    environment = {"PYTHONPATH": f"{TRAINER}:{tmp_path}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [said]


def test_modules_for_neuron_are_imported_only_with_that_extra() -> None:
    code = "import json, smoke_test as s; print(json.dumps({part: s.modules_of(part) for part in s.IMPORTS}))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(TRAINER)}, capture_output=True, text=True, check=True
    )
    listed = json.loads(done.stdout)
    assert "genvalues.ops.image" in listed["command"] and "genvalues.cluster.runner" in listed["command"]
    assert "llama_lora.stages.merge" in listed["trainer"] and not any(".neuron" in one for one in listed["trainer"])
    assert all(".neuron" in name for name in listed["neuron"])
