"""A stand-in for Helm: a script that records its arguments and answers questions about releases from files.

Its answers have the form of Helm 3.22 and 4.3, as `helm status -o json` of both prints it,
except for fields that genvalues does not read.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml

PYTHON = sys.executable  # the fixture changes what sys.executable says

SCRIPT = """#!{python} -IS
import json, os, signal, sys, time
from pathlib import Path

folder = Path({folder!r})
arguments = sys.argv[1:]
positional = [word for word in arguments if not word.startswith("-")]


def stopped(*_):
    (folder / "stopped").write_text("")
    sys.exit(1)


def refuse(message):
    print("Error: " + message, file=sys.stderr)
    sys.exit(1)


verb = arguments[0]
if verb == "version":
    print("v3.22.0", end="")
    sys.exit(0)
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
if verb in ("upgrade", "uninstall"):
    signal.signal(signal.SIGTERM, stopped)
    if verb == "upgrade":
        (folder / "values.yaml").write_text(Path(arguments[5]).read_text())
    print("NOTES", flush=True)
    print("Error:" + (folder / "error").read_text(), end="", file=sys.stderr, flush=True)
    (folder / "asked.part").write_text(json.dumps(arguments))
    (folder / "asked.part").rename(folder / "asked")
    while (folder / "sleep").exists():
        time.sleep(0.02)
    sys.exit(int((folder / "status").read_text()))
if (folder / "refuses").exists():
    refuse((folder / "refuses").read_text())
releases = sorted(path.stem for path in (folder / "releases").glob("*.json"))
if verb == "list":
    print(json.dumps([{{"name": name, "namespace": "team-a"}} for name in releases]))
    sys.exit(0)
name = positional[1] if verb == "status" else positional[2]
in_config_maps = os.environ.get("HELM_DRIVER") == "configmap"
if name not in releases or in_config_maps != name.endswith("-run"):  # where the runner keeps an inner release's records
    refuse("release: not found")
document = json.loads((folder / "releases" / (name + ".json")).read_text())
print(json.dumps(document["status"] if verb == "status" else document["all" if "--all" in arguments else "values"]))
"""


@cache
def as_yaml(item: str) -> str:
    """JSON as YAML. A test records the same objects again after each of their changes."""
    return yaml.dump(json.loads(item), Dumper=yaml.CSafeDumper)  # type: ignore[no-any-return]


class FakeHelm:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "releases").mkdir(parents=True)
        command = folder / "helm"
        command.write_text(SCRIPT.format(python=PYTHON, folder=str(folder)))
        command.chmod(0o755)
        self.ends_with(0)
        self.says("\n")

    def ends_with(self, status: int) -> None:
        (self.folder / "status").write_text(str(status))

    def says(self, error: str) -> None:
        """Have this on stderr of an upgrade or uninstall, after "Error:"."""
        (self.folder / "error").write_text(error)

    def refuses(self, message: str) -> None:
        """Fail every question about a release with this message of Helm."""
        (self.folder / "refuses").write_text(message)

    @property
    def asked(self) -> list[str]:
        """The arguments of the upgrade or uninstall, once it has started."""
        asked = self.folder / "asked"
        return json.loads(asked.read_text()) if asked.exists() else []

    @property
    def calls(self) -> list[list[str]]:
        calls = self.folder / "calls"
        return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    def has(
        self,
        objects: list[dict[str, Any]],
        *,
        name: str = "demo",
        status: str = "deployed",
        revision: int = 1,
        updated: str = "2026-01-01T00:00:00.5Z",
        phases: dict[str, str] | None = None,
        values: dict[str, Any] | None = None,
        all_values: dict[str, Any] | None = None,
    ) -> None:
        """Add a release of these rendered objects; ``phases`` by hook: those that are missing have not started."""
        hooks, ordinary = [], []
        for item in objects:
            annotations = item["metadata"].get("annotations") or {}
            if "helm.sh/hook" not in annotations:
                ordinary.append(item)
                continue
            hooks.append(
                {
                    "name": item["metadata"]["name"],
                    "kind": item["kind"],
                    "path": "llama-lora/templates/x.yaml",
                    "manifest": as_yaml(json.dumps(item)),
                    "events": annotations["helm.sh/hook"].split(","),
                    "last_run": {"phase": (phases or {}).get(item["metadata"]["name"], "")},
                }
            )
        document = {
            "name": name,
            "namespace": "team-a",
            "version": revision,
            "info": {"status": status, "last_deployed": updated, "description": "Install complete"},
            "manifest": "---\n".join(as_yaml(json.dumps(item)) for item in ordinary),
            "hooks": hooks,
        }
        written = {"status": document, "values": values or {}, "all": all_values or {}}
        partial = self.folder / "part"
        partial.write_text(json.dumps(written))
        partial.rename(self.folder / "releases" / f"{name}.json")

    def forget(self, name: str = "demo") -> None:
        (self.folder / "releases" / f"{name}.json").unlink()
