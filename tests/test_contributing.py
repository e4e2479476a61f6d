"""CONTRIBUTING.md is true: what it says to edit, and no more, adds a setting, an instance type and a stage.

Each test makes the edits in a copy of the sources and uses what they add from there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from genvalues.common.helm import find_helm

ROOT = Path(__file__).parents[1]
SOURCES = ("chart", "docs", "generator", "trainer", "values")


class Copy:
    """A copy of the sources, in which commands see the copy's packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in SOURCES:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))

    def insert(self, file: str, after: str, line: str) -> None:
        """One edit by hand: a line after the line that contains ``after``."""
        path = self.folder / file
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        (index,) = [index for index, each in enumerate(lines) if after in each]
        lines.insert(index + 1, line)
        path.write_text("".join(lines), encoding="utf-8")

    def python(self, *arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": f"{self.folder / 'generator'}:{self.folder / 'trainer'}"}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def genvalues(self, *arguments: str) -> str:
        return self.python("-m", "genvalues.cli", *arguments)

    def rendered(self, values: str) -> list[dict[str, object]]:
        """The objects of the copy's chart with a values file."""
        (self.folder / "rendered-values.yaml").write_text(values, encoding="utf-8")
        command = [find_helm(), "template", "llama", "chart", "--values", "rendered-values.yaml"]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [item for item in yaml.safe_load_all(done.stdout) if item]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


@pytest.mark.slow
def test_a_setting_takes_its_declaration_the_line_that_uses_it_and_its_test(copy: Copy) -> None:
    declaration = '    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) (arXiv:2312.03732).")\n'
    copy.insert("generator/genvalues/settings/run.py", "    dropout: Fraction", declaration)
    copy.insert(
        "trainer/llama_lora/backends/lora.py", "        lora_alpha=lora.alpha", "        use_rslora=lora.use_rslora,\n"
    )
    copy.python("-m", "genvalues.settings.generate")

    assert "lora.useRslora" in (copy.folder / "docs/values.md").read_text(encoding="utf-8")
    assert "lora.useRslora" in (copy.folder / "docs/inputs.md").read_text(encoding="utf-8")
    assert "  useRslora: false  # Scale by" in (copy.folder / "chart/values.yaml").read_text(encoding="utf-8")
    runs = {"native": "values/cpu.yaml", "xla": "values/trn1.yaml"}
    for backend, inputs in runs.items():
        values = copy.genvalues("write", inputs, "--set", "lora.useRslora=true", "-o", "-")
        (config,) = [item for item in copy.rendered(values) if item["kind"] == "ConfigMap"]
        (copy.folder / backend).write_text(config["data"]["run.yaml"], encoding="utf-8")  # type: ignore[index]
    # Both backends build their adapter with this function.
    code = (
        "import sys; from pathlib import Path; from llama_lora.config import load; "
        "from llama_lora.backends.lora import lora_config; configs = [load(Path(run)) for run in sys.argv[1:]]; "
        "print(*((config.backend, lora_config(config.lora).use_rslora) for config in configs))"
    )
    assert copy.python("-c", code, *runs) == "('native', True) ('xla', True)\n"
    wrong = subprocess.run(
        [sys.executable, "-m", "genvalues.cli", "check", "values/cpu.yaml", "--set", "lora.useRslora=2"],
        cwd=copy.folder,
        env={**os.environ, "PYTHONPATH": f"{copy.folder / 'generator'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert wrong.returncode == 2 and "--set lora.useRslora=2: must be true or false" in wrong.stderr


def test_an_instance_type_takes_a_row_and_its_price(copy: Copy) -> None:
    row = '    "trn1.16xlarge": Instance(TRN1, 8, 16, 4, 64, request_cpu=56, request_memory_gib=220),\n'
    copy.insert("generator/genvalues/accelerators/instances.py", '    "trn1.2xlarge": Instance(', row)
    prices = copy.folder / "generator/genvalues/planner/prices.json"
    table = json.loads(prices.read_text(encoding="utf-8"))
    table["regions"]["us-west-2"]["trn1.16xlarge"] = [10.75, "on demand"]
    prices.write_text(json.dumps(table), encoding="utf-8")
    copy.python("-m", "genvalues.settings.generate")

    values = yaml.safe_load(copy.genvalues("write", "values/trn1.yaml", "--set", "instance=trn1.16xlarge", "-o", "-"))
    assert values["devices"] == {"aws.amazon.com/neuron": 8, "vpc.amazonaws.com/efa": 4}
    assert values["parallelism"]["processesPerNode"] == 16
    assert values["guards"]["pricePerNodeHour"] == 10.75


def test_an_architecture_takes_an_entry_and_a_row(copy: Copy) -> None:
    entry = '    "madeup": ModelType("MadeUpForCausalLM", "Made-Up", normalizes_heads=True),\n'
    copy.insert("generator/genvalues/accelerators/architectures.py", '    "llama": ModelType(', entry)
    table = copy.folder / "generator/genvalues/accelerators/architectures.json"
    models = json.loads(table.read_text(encoding="utf-8"))
    sizes = models["architectures"]["llama-3-8b"]["config"] | {"model_type": "madeup"}
    models["architectures"]["madeup-8b"] = {"models": ["org/madeup-8b"], "config": sizes}
    table.write_text(json.dumps(models), encoding="utf-8")

    plan = json.loads(copy.genvalues("plan", "values/trn1.yaml", "--set", "model=org/madeup-8b", "--offline", "--json"))
    assert plan["memory"]["total"] < plan["memory"]["hbm"]
    values = copy.genvalues("write", "values/trn1.yaml", "--set", "model=org/madeup-8b", "-o", "-")
    (config,) = [item for item in copy.rendered(values) if item["kind"] == "ConfigMap"]
    (copy.folder / "run.yaml").write_text(config["data"]["run.yaml"], encoding="utf-8")  # type: ignore[index]
    of_trainer = (
        "from pathlib import Path; from llama_lora.config import load; from llama_lora.backends.xla import rules; "
        f"print(rules.check(load(Path('run.yaml')), {sizes!r} | {{'architectures': ['MadeUpForCausalLM']}}))"
    )
    assert copy.python("-c", of_trainer) == "[]\n"


STAGE = '''"""Count the tensors of the merged model."""

from __future__ import annotations

from llama_lora.stage import Declaration, Stage


def count(stage: Stage) -> None:
    stage.facts = {"files": len(list(stage.paths.merged.glob("*.safetensors")))}


STAGE = Declaration(
    name="count", version=1, summary="Count the files.", after=["merge"], reads=lambda config: {}, run=count
)
'''


def test_a_stage_takes_a_module_a_folder_of_the_chart_and_a_block_of_values(copy: Copy) -> None:
    (copy.folder / "trainer/llama_lora/stages/count.py").write_text(STAGE, encoding="utf-8")
    template = (copy.folder / "chart/templates/merge/job.yaml").read_text(encoding="utf-8")
    job = copy.folder / "chart/templates/count/job.yaml"
    job.parent.mkdir()
    job.write_text(template.replace('"merge"', '"count"').replace('"weight" 50', '"weight" 55'), encoding="utf-8")
    block = '    count: StageSettings = Field(StageSettings(), description="Counts the files of the merged model.")\n'
    values = copy.folder / "generator/genvalues/settings/values.py"
    text = values.read_text(encoding="utf-8")
    values.write_text(
        text.replace("    verify: StageSettings", f"{block}    verify: StageSettings", 1), encoding="utf-8"
    )
    copy.python("-m", "genvalues.settings.generate")

    assert "count" in copy.python("-m", "llama_lora.cli", "--help")
    objects = copy.rendered((copy.folder / "values/cpu.values.yaml").read_text(encoding="utf-8"))
    (job_object,) = [item for item in objects if item["metadata"]["name"] == "llama-count"]  # type: ignore[index]
    assert job_object["metadata"]["annotations"]["helm.sh/hook-weight"] == "55"  # type: ignore[index]
