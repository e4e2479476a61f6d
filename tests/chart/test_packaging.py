"""The chart as files: it passes lint, and a fresh clone renders without network access with Helm 3 and 4."""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import jsonschema
import pytest
import yaml

from chart.manifests import CHART, CI_FILES, MINIMAL, ROOT, Refused, render, run_helm

DRAFT_07 = {
    *("$schema", "$ref", "$id", "$comment", "title", "description", "default", "examples", "definitions"),
    *("type", "enum", "const", "properties", "patternProperties", "additionalProperties", "propertyNames"),
    *("required", "minProperties", "maxProperties", "dependencies", "items", "additionalItems", "contains"),
    *("minItems", "maxItems", "uniqueItems", "minLength", "maxLength", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("allOf", "anyOf", "oneOf", "not", "if", "then", "else"),
}


def test_values_files_of_every_branch_are_tested() -> None:
    names = {path.name.removesuffix("-values.yaml") for path in CI_FILES}
    assert names >= {"cpu", "trn1", "trn1-2node", "kueue-hyperpod", "existing-claim", "fsx-static", "detached"}
    assert "everything" in names


def test_every_values_file_passes_lint_strict(values_file: Path, helm: int) -> None:
    done = run_helm(helm, "lint", "--strict", CHART, "--values", values_file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Fail" not in done.stderr and "funcMap fail" not in done.stderr, "lint ignores fail"


def test_the_defaults_pass_lint_and_rendering_them_names_the_required_keys(helm: int) -> None:
    assert run_helm(helm, "lint", "--strict", CHART).returncode == 0
    with pytest.raises(Refused) as refused:
        render({}, helm=helm)
    for key in ["model.id", "dataset.source", "dataset.format"]:
        assert f"{key} is required. Set it" in str(refused.value)


def test_both_helms_render_the_same(values_file: Path) -> None:
    def comparable(helm: int) -> list[str]:
        objects = [json.dumps(item, sort_keys=True) for item in render(values_file, helm=helm)]
        # The inner release's values: Helm 4 drops nulls, and both treat a null as a missing key.
        return sorted(re.sub(r"(\\n *\w+: null)", "", text) for text in objects)

    assert comparable(3) == comparable(4)


def test_the_lock_at_the_top_equals_the_charts() -> None:
    assert (ROOT / "Chart.lock").is_symlink()
    assert str((ROOT / "Chart.lock").readlink()) == "chart/Chart.lock"
    locked = yaml.safe_load((ROOT / "Chart.lock").read_text())
    assert locked["dependencies"] == [{"name": "storage", "repository": "", "version": "0.1.0"}]


def test_a_fresh_clone_renders_and_builds_its_dependencies_without_network_access(helm: int, tmp_path: Path) -> None:
    clone = tmp_path / "chart"
    shutil.copytree(CHART, clone)
    nothing = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    no_network = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https", "HTTP", "HTTPS")}
    environment = {**nothing, **no_network}
    values = CHART / "ci/cpu-values.yaml"

    rendered = run_helm(helm, "template", "llama", clone, "--values", values, env=environment)
    assert rendered.returncode == 0, rendered.stderr
    listed = run_helm(helm, "dependency", "list", clone, env=environment)
    assert "unpacked" in listed.stdout and "missing" not in listed.stdout
    built = run_helm(helm, "dependency", "build", clone, env=environment)
    assert built.returncode == 0, "Chart.lock does not fit Chart.yaml: " + built.stderr
    assert (clone / "Chart.lock").read_text() == (CHART / "Chart.lock").read_text()
    assert (clone / "charts/storage/Chart.yaml").is_file()


def package(helm: int, folder: Path) -> Path:
    done = run_helm(helm, "package", CHART, "--destination", folder)
    assert done.returncode == 0, done.stderr
    [file] = folder.glob("llama-lora-*.tgz")
    return file


def test_the_package_has_subchart_schema_readme_and_helm_tests_but_no_test_values(helm: int, tmp_path: Path) -> None:
    with tarfile.open(package(helm, tmp_path)) as packed:
        files = {name.removeprefix("llama-lora/") for name in packed.getnames()}
    assert {"charts/storage/templates/claim.yaml", "values.schema.json", "README.md"} <= files
    assert any(name.startswith("templates/tests/") for name in files)
    assert not [name for name in files if name.startswith("ci/")]


def test_the_package_renders_the_same_as_the_folder(helm: int, tmp_path: Path) -> None:
    packed = package(helm, tmp_path)
    for values in CI_FILES:
        assert render(values, helm=helm, chart=packed) == render(values, helm=helm)
    with pytest.raises(Refused, match=r"lora[./]r"):  # the schema is enforced for the package too
        render({**MINIMAL, "lora": {"r": 0}}, helm=helm, chart=packed)


def test_the_package_shows_its_values_and_its_readme(helm: int, tmp_path: Path) -> None:
    packed = package(helm, tmp_path)
    for what, file in {"values": "values.yaml", "readme": "README.md"}.items():
        assert run_helm(helm, "show", what, packed).stdout.strip() == (CHART / file).read_text().strip()


def test_annotations_are_valid_for_artifact_hub() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    annotations = {name.removeprefix("artifacthub.io/"): value for name, value in chart["annotations"].items()}
    assert set(annotations) == {"license", "category", "prerelease", "changes", "links"}, (
        "no annotation images, because no image is public"
    )
    assert (annotations["license"], annotations["category"]) == ("Apache-2.0", "ai-machine-learning")
    assert annotations["prerelease"] in ("true", "false"), "Helm accepts only strings"
    for change in yaml.safe_load(annotations["changes"]):
        assert change.keys() == {"kind", "description"}
        assert change["kind"] in {"added", "changed", "deprecated", "removed", "fixed", "security"}
    for link in yaml.safe_load(annotations["links"]):
        assert link.keys() == {"name", "url"} and link["url"].startswith("https://")


def test_the_schema_is_strict_and_uses_only_keywords_of_draft_07() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    jsonschema.Draft7Validator.check_schema(schema)
    free = {"global", "items", "preference", "podAffinityTerm"}
    objects = ("extraVolumes.additional", "extraVolumes.^", "extraObjects.additional")

    def check(part: object, where: str) -> None:
        if not isinstance(part, dict):
            return
        assert part.keys() <= DRAFT_07, f"{where}: {part.keys() - DRAFT_07}"
        may_be_object = part.get("type") == "object"
        if may_be_object and where.rpartition(".")[2] not in free and not any(each in where for each in objects):
            assert part.get("additionalProperties", True) is not True, f"{where} lets everything in"
        for group in ("properties", "patternProperties", "definitions"):
            for name, inner in part.get(group, {}).items():
                check(inner, f"{where}.{name}")
        for word in ("items", "not", "if", "then", "else"):
            check(part.get(word), f"{where}.{word}")
        check(part.get("additionalProperties"), f"{where}.additional")
        for word in ("anyOf", "oneOf", "allOf"):
            for inner in part.get(word, []):
                check(inner, where)

    check(schema, "values")


def test_every_default_is_described_in_the_schema_and_valid() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    jsonschema.Draft7Validator(schema).validate(defaults)

    def described(part: dict) -> bool:
        return "description" in (schema["definitions"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part)

    def check(part: dict, values: dict, where: str) -> None:
        known = {name: inner for name, inner in part["properties"].items() if name != "global"}
        assert set(values) == set(known), f"{where}: {set(values) ^ set(known)} in one of values.yaml and schema only"
        for name, inner in known.items():
            assert described(inner), f"{where}.{name} has no description"
            if "properties" in inner and name not in {"columns", "stages"}:
                check(inner, values[name], f"{where}.{name}")

    check(schema, defaults, "values")
    assert set(defaults["stages"]) == set(schema["properties"]["stages"]["properties"])


def test_values_yaml_explains_each_section() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    for number, line in enumerate(lines):
        if line and not line.startswith((" ", "#")):
            assert lines[number - 1].startswith("#") or "#" in line, (
                f"values.yaml:{number + 1}: {line} is not explained"
            )


def test_the_minimal_values_render(helm: int) -> None:
    assert render(MINIMAL, helm=helm)
