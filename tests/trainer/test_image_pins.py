"""The image's Dockerfile and what it pins: everything, exactly, and so that it fits together. Asks nobody."""

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
# Who runs the image's Python. Debian's, in the cluster tests, is 3.11.
ENVIRONMENT = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.12", "sys_platform": "linux"}
ENVIRONMENT |= {"platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
ENVIRONMENT |= {"implementation_name": "cpython", "platform_python_implementation": "CPython"}


def pins_module() -> Any:
    """trainer/pins.py, which is a script of the image and in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TRAINER))
        import pins
    return pins


pins = pins_module()
SECTIONS: dict[str, dict[str, str]] = pins.sections()
BY_NAME = {pins.normal(name): version for section in SECTIONS.values() for name, version in section.items()}
OF_THE_BASE = {pins.normal(name) for section in ("base", "sdk") for name in SECTIONS[section]}
RECORDED: dict[str, dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def ours(*extras: str) -> list[Requirement]:
    optional = [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return [Requirement(line) for line in [*PROJECT["dependencies"], *optional]]


def closure(requirements: list[Requirement]) -> dict[str, list[Requirement]]:
    """All packages that these need, and who asks for each with what; below torch and AWS's own nothing is ours."""
    asked: dict[str, list[Requirement]] = {}
    seen: set[str] = set()
    todo = list(requirements)
    while todo:
        wanted = todo.pop()
        name = pins.normal(wanted.name)
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


def test_every_package_that_ours_need_is_pinned() -> None:
    assert len(NEEDED) > 80
    assert sorted(set(NEEDED) - set(BY_NAME)) == []


def test_nothing_is_pinned_that_nobody_needs() -> None:
    of_torch_neuronx = {"torch-xla"}
    assert sorted(set(BY_NAME) - set(NEEDED) - OF_THE_BASE - of_torch_neuronx) == []


@pytest.mark.parametrize("name", sorted(NEEDED))
def test_a_pin_is_what_everybody_asks_for(name: str) -> None:
    for wanted in NEEDED[name]:
        assert wanted.specifier.contains(BY_NAME[name], prereleases=True), f"{wanted}, and {BY_NAME[name]} is pinned"


def test_each_section_is_whole_without_the_next() -> None:
    """The image of the command alone, and that of a CPU, are built from their sections only."""
    there = set(OF_THE_BASE)
    for section, extras in (("command", ()), ("trainer", ("trainer",)), ("neuron", ("trainer", "neuron"))):
        there |= {pins.normal(name) for name in SECTIONS[section]}
        assert set(closure(ours(*extras))) <= there, section


def test_what_is_known_of_the_pins_is_up_to_date() -> None:
    """Else run: python tests/trainer/image_pins.py"""
    of_pypi = {pins.normal(name): v for key, of in SECTIONS.items() if key != "sdk" for name, v in of.items()}
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


def test_the_pins_that_go_together_are_optimum_neurons_own() -> None:
    """FIELD-NOTES 1, and the extras training and neuronx of optimum-neuron 0.4.5."""
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
def test_what_is_no_exact_pin_is_refused(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "constraints.txt").write_text(f"# [base]\n{wrong}\n")
    with pytest.raises(ValueError, match="write each package once"):
        pins.sections(tmp_path / "constraints.txt")


def test_pip_is_never_given_what_the_base_brings() -> None:
    for extras in ("", "[trainer]", EXTRAS):
        done = subprocess.run([sys.executable, TRAINER / "pins.py", extras], capture_output=True, text=True, check=True)
        given = {pins.normal(line.partition("==")[0]) for line in done.stdout.splitlines()}
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
    """Everything else stays out of a build: inputs files, keys, environments."""
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
    """So that a change of ours leaves the layers of gigabytes as they are; and of labels, all."""
    text = [f"{kind} {text}" for kind, text in instructions()]
    at = [next(place for place, line in enumerate(text) if word in line) for word in ("pins.txt", "COPY generator gen")]
    assert at == sorted(at)
    assert text[-1].startswith("LABEL ") and text[-2].startswith("ARG ")


def test_labels_say_what_it_is() -> None:
    labels = next(text for kind, text in instructions() if kind == "LABEL")
    named = set(re.findall(r"org\.opencontainers\.image\.([a-z.]+)=", labels))
    assert named == {"title", "description", "licenses", "version", "revision", "base.name"}


def test_another_processor_is_refused_first() -> None:
    first = next(text for kind, text in instructions() if kind == "RUN")
    assert "uname -m" in first and "x86_64" in first and "exit 1" in first


# --- the smoke test


def freeze(folder: Path, **changed: str) -> Path:
    """A constraints file for this very environment."""
    import importlib.metadata

    there = {pins.normal(of.metadata["Name"]): of.version for of in importlib.metadata.distributions()} | changed
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


def test_what_is_whole_passes(tmp_path: Path) -> None:
    done = smoke_test("[trainer]", "--constraints", freeze(tmp_path), path=str(Path(sys.executable).parent))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "The image is whole: command, trainer.\n"


def test_all_that_is_missing_is_told_at_once(tmp_path: Path) -> None:
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
    assert first == f"The image is not whole ({len(rest)}):"
    peft = f"  peft is {version('peft')}; constraints.txt has 0.16.0"
    assert {peft, "  no-such-package is not installed; constraints.txt has 1.0"} <= set(rest)
    assert "  helm version --short: ends with status 1: Error: no such chart" in rest
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
        ("import os; os.abort()", "import broken: ends with status -6: importing broken"),
        ("import no_such_module", "import broken: ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_an_import_that_fails_or_crashes_has_a_name(tmp_path: Path, body: str, said: str) -> None:
    (tmp_path / "broken.py").write_text(body)
    code = "import smoke_test; print(*smoke_test.failing_imports('command', ['json', 'broken', 'csv']), sep='\\n')"
    environment = {"PYTHONPATH": f"{TRAINER}:{tmp_path}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [said]


def test_what_needs_neuron_is_imported_with_neuron_alone() -> None:
    code = "import json, smoke_test as s; print(json.dumps({part: s.modules(part) for part in s.IMPORTS}))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(TRAINER)}, capture_output=True, text=True, check=True
    )
    listed = json.loads(done.stdout)
    assert "genvalues.ops.image" in listed["command"] and "genvalues.cluster.runner" in listed["command"]
    assert "llama_lora.stages.merge" in listed["trainer"] and not any(".neuron" in one for one in listed["trainer"])
    assert all(".neuron" in name for name in listed["neuron"])
