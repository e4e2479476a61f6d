"""The pages match the repository: links, commands, labels, and the picture of the pipeline."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from chart.manifests import MINIMAL, config, merged, pods, render
from draw_pipeline import PICTURE, VALUES, attached, picture, stages_of
from genvalues.cli import genvalues
from genvalues.common.helm import find_helm

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "chart/README.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_README_LINES = 130


def headings(page: Path) -> set[str]:
    """The anchors that GitHub generates."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        other = page.parent / file if file else page
        assert other.is_file(), target
        assert not anchor or anchor in headings(other), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_uses_only_commands_and_options_of_genvalues_that_exist(page: Path) -> None:
    for line in re.findall(r"^ {4}(?:\$ )?(genvalues [a-z].*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        command: click.Command = genvalues
        for word in re.split(r" (?:&&|\||>|#) ", line)[0].split()[1:]:
            if isinstance(command, click.Group):
                found = command.get_command(click.Context(command), word)
                assert found is not None, line
                command = found
            elif word.startswith("-") and word != "-":
                options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
                assert word.partition("=")[0] in options, line


def test_every_page_can_be_reached_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in set(PAGES) - {ROOT / "README.md", ROOT / "chart/README.md"}:
        assert f"]({page.relative_to(ROOT)}" in readme


def test_each_promise_of_the_security_page_has_its_test() -> None:
    rows = [
        line for line in (ROOT / "docs/security.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")
    ]
    promises = [line for line in rows if not line.startswith(("|---", "| promise"))]
    assert len(promises) > 25
    for promise in promises:
        named = re.findall(r"`(tests/[\w/.]+)::(test_\w+)`", promise.split("|")[2])
        assert named, promise
        for file, test in named:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_README_LINES


def test_the_plan_in_the_readme_is_what_genvalues_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [(command, shown)] = re.findall(r"^ {4}\$ genvalues (plan .+)\n((?: {4}.+\n)+)", readme, re.MULTILINE)
    done = CliRunner().invoke(genvalues, [*command.split(), "--offline"])
    assert done.exit_code == 0, done.output
    assert {line[4:] for line in shown.splitlines()} <= set(done.output.splitlines())


def test_the_picture_shows_the_charts_stages() -> None:
    values = attached(yaml.safe_load(VALUES.read_text(encoding="utf-8")))
    stages = stages_of(render(values))
    assert {stage.name for stage in stages if stage.devices} == {"compile", "train"}
    assert PICTURE.read_text(encoding="utf-8") == picture(stages), "run: make generate"


@pytest.mark.parametrize("name", ["operations.md", "gitops.md"])
def test_commands_select_by_labels_of_the_charts_objects(name: str) -> None:
    attached, detached = (render(merged(MINIMAL, {"pipeline": {"mode": mode}})) for mode in ("attached", "detached"))
    inner = render(config(detached, "values.yaml"), release="llama-run")
    labels = [item["metadata"]["labels"] for objects in (attached, detached, inner) for item in objects]
    labels += [pod.template["metadata"]["labels"] for objects in (attached, detached, inner) for pod in pods(objects)]
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:\$COMPONENT|app\.kubernetes\.io/component)=([a-z-]+)", text))
    assert "runner" in named
    assert named <= {label["app.kubernetes.io/component"] for label in labels}
    assert {label["app.kubernetes.io/instance"] for label in labels} == {"llama", "llama-run"}
    assert {label["app.kubernetes.io/part-of"] for label in labels} == {"llama-lora"}


def test_the_commands_of_operations_md_use_only_what_its_first_lines_set() -> None:
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    set_there = set(re.findall(r"(?:^ {4}|\s)([A-Z]+)=", text))
    used = set(re.findall(r"\$([A-Z]+)", text))
    assert used <= set_there
    for block in re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE):
        for line in block.splitlines():
            assert line.count("'") % 2 == 0 and line.count('"') % 2 == 0, line


def test_the_commands_of_the_acceptance_run_change_the_charts_job_of_train() -> None:
    text = (ROOT / "docs/neuron.md").read_text(encoding="utf-8")
    section = text[text.index("## The acceptance run") :].replace("\\\n", "")
    [render_command] = re.findall(r'RENDER="helm (.+)"', section)
    [(template, edits)] = re.findall(r"\$RENDER (templates/train/\S+) \| sed (.+?) \|", section)
    options = render_command.replace("$R", "r").replace("$NS", "ns").replace("values.yaml", "values/trn2.values.yaml")
    command = [find_helm(), *options.split(), template]
    rendered = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for expression in shlex.split(edits.replace("-e ", "")):
        before, after = re.fullmatch(r"s/(.+)/(.+)/", expression).groups()  # type: ignore[union-attr]
        assert rendered.count(before) == 1, expression
        rendered = rendered.replace(before, after)
    spec = yaml.safe_load(rendered)["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert not spec["runPolicy"]["suspend"] and worker["restartPolicy"] == "Never"
    [container] = worker["template"]["spec"]["containers"]
    assert container["command"][:2] == ["llama-lora", "acceptance"]
    for stage in re.findall(r"for STAGE in (.+?);", section)[0].split():
        assert (ROOT / f"chart/templates/{stage}/job.yaml").is_file()


def test_the_table_of_clusters_says_of_each_cell_what_was_tried() -> None:
    """EKS, EKS Auto Mode and HyperPod, with Kueue, Karpenter, both Trainers and Pod Security."""
    page = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("|") and not line.startswith("|---")
    ]
    assert table[0] == ["", "EKS", "EKS Auto Mode", "HyperPod (EKS)"]
    rows = {row[0]: row[1:] for row in table[1:] if len(row) == 4}
    for words in ("pytorchjob", "trainjob", "Kueue, PyTorchJob", "Kueue, TrainJob", "Karpenter", "Pod Security", "FSx"):
        assert any(words in name for name in rows), words
    said = re.compile(r"\brun\b|\brendered\b|not tried|not checked|refused|not supported|the same|recorded|^$")
    assert [(name, cell) for name, cells in rows.items() for cell in cells if not said.search(cell)] == []
