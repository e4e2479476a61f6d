"""A program named helm whose answers are not those of Helm 3.14 or newer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from genvalues.common import helm
from genvalues.common.errors import UserError
from genvalues.inputs.chart import BESIDE_THE_SOURCES as CHART

CHART_YAML = "apiVersion: v2\\nname: llama-lora\\nversion: 0.1.0\\n"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where find_helm looks first."""
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    return tmp_path / "helm"


def says(program: Path, output: str, version: str = "v3.22.0") -> None:
    """Print ``output``, in printf's notation, to every question but that for the version and for Chart.yaml."""
    program.write_text(
        "#!/bin/sh\n"
        f"case $1 in version) printf '{version}';; show) printf '{CHART_YAML}';; *) printf -- '{output}';; esac\n"
    )
    program.chmod(0o755)


OUTPUTS = ["null", "[null, 5, {}]", "kind: x", "- a: [", "\\377"]


@pytest.mark.parametrize("output", OUTPUTS, ids=ascii)
def test_output_that_is_not_helms_is_an_error_that_names_the_program(program: Path, output: str) -> None:
    says(program, output)
    invalid = re.escape(f"the output of {program} is not valid (")
    for ask in (helm.releases, lambda *place: helm.revision("demo", *place)):
        with pytest.raises(UserError, match=f"^(namespace team-a|release demo): {invalid}"):
            ask("team-a", None)
    if output != "null":  # no objects
        with pytest.raises(UserError, match=invalid):
            helm.render(CHART, "demo", {})


def test_an_error_of_helm_that_is_not_utf_8_is_an_error_that_names_the_program(program: Path) -> None:
    says(program, "")
    program.write_text(program.read_text().replace("*) ", "*) printf '\\377' >&2; exit 1; "))
    with pytest.raises(UserError, match=re.escape(f"the output of {program} is not valid (UnicodeDecodeError")):
        helm.releases("team-a", None)


def test_what_helm_asks_is_shown_while_it_waits(program: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Such as an MFA code, for which a credential plugin asks without a line break."""
    waits = program.with_name("waits")
    waits.touch()
    program.write_text(
        "#!/bin/sh\nprintf 'token hf_abcdef, code? ' >&2\n"
        f"for n in $(seq 500)\ndo test -e {waits} && sleep 0.02\ndone\n"
    )
    program.chmod(0o755)
    shown = ""

    def look() -> None:
        nonlocal shown
        shown += capfd.readouterr().err
        if shown == "token hf_..., code? ":
            waits.unlink()

    helm.run_helm(["list"], meanwhile=look, interval=0.05)
    assert not waits.exists()


@pytest.mark.parametrize("version", ["v2.9.0", "v3.13.9"])
def test_a_helm_that_is_too_old_is_refused(program: Path, version: str) -> None:
    says(program, "[]", version)
    with pytest.raises(UserError, match=re.escape(f"{program} is Helm {version[1:]}. ") + ".*3.14 or newer"):
        helm.releases("team-a", None)


@pytest.mark.parametrize("version", ["v3.14.0", "v4.3.1+g123", "v10.0.0-rc.1"])
def test_a_helm_that_is_new_enough_is_used(program: Path, version: str) -> None:
    says(program, "[]", version)
    assert helm.releases("team-a", None) == []


def test_a_version_that_is_not_one_is_told_in_one_line(program: Path) -> None:
    says(program, "[]", "a\\nb\\033[31m")
    with pytest.raises(UserError) as raised:
        helm.releases("team-a", None)
    assert f"cannot read the version of {program}: a?b?[31m" in str(raised.value)
