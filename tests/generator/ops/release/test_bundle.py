"""genvalues bundle: what a bug report needs and no secrets; and genvalues local, which replays its values."""

from __future__ import annotations

import gzip
import io
import json
import os
import stat
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from generator.cluster.fake_api import FakeApi
from generator.ops.release.fake_helm import FakeHelm
from generator.ops.release.run import Outer, Run
from generator.ops.release.test_status import genvalues
from genvalues import __version__
from genvalues.common.errors import UserError
from genvalues.inputs.input_options import Sources
from genvalues.ops import bundle, redact
from genvalues.ops.local import local_values
from genvalues.ops.local.run import rendered_objects
from genvalues.ops.redact import redact_object, redact_text

# Must not appear in a bundle. Not real ones, and assembled, so that no secret scanner finds them here.
TOKENS = ["hf_" + "planted0123456789", "AKIA" + "PLANTED012345678"[:16], "ghp_" + "planted0123456789planted"]
SECRET = "only-its-name-tells"
ACCOUNT = "210987654321"
ACCOUNT_IN_CI = "123456789012"
ROOT = Path(__file__).parents[4]
CHART = ROOT / "chart"


@pytest.fixture
def run(fake: FakeApi, helm: FakeHelm) -> Run:
    return Run(fake, helm)


def pack(*arguments: str, release: str = "demo") -> dict[str, str]:
    assert genvalues("bundle", release, "-n", "team-a", "-o", "b.tar.gz", *arguments) == 0
    with tarfile.open("b.tar.gz") as tar:
        return {one.name: tar.extractfile(one).read().decode() for one in tar}  # type: ignore[union-attr]


def test_bundle_contains_what_a_bug_report_needs(run: Run, fake: FakeApi) -> None:
    first, _ = run.to_train()
    fake.logs[first] = ["step 1"]
    fake.previous_logs[first] = ["before the restart"]
    fake.merge(
        "pods",
        first,
        {"status": {"containerStatuses": [{"name": "pytorch", "state": {"running": {}}, "restartCount": 1}]}},
    )
    fake.add("nodes", {"metadata": {"name": "node-0", "labels": {"node.kubernetes.io/instance-type": "trn1.32xlarge"}}})
    fake.add("events", {"metadata": {"name": "e1"}, "involvedObject": {"name": "demo-train-1"}, "message": "ours"})
    fake.add("events", {"metadata": {"name": "e2"}, "involvedObject": {"name": "others"}, "message": "theirs"})
    files = pack()
    about = json.loads(files["bundle/about.json"])
    assert (about["genvalues"], about["chart"], about["helm"]) == (__version__, "0.1.0", "3.22.0")
    assert "org/model" in files["bundle/values.yaml"]
    assert "demo-train-gate" in files["bundle/release/hooks.yaml"] and "Running" in files["bundle/release/hooks.yaml"]
    assert "demo-config" in files["bundle/release/manifest.yaml"]
    assert "backend: native" in files["bundle/release/config/run.yaml"]
    assert "tensor" not in files["bundle/objects/nodes.yaml"] and "trn1.32xlarge" in files["bundle/objects/nodes.yaml"]
    assert "ours" in files["bundle/objects/events.yaml"] and "theirs" not in files["bundle/objects/events.yaml"]
    assert files[f"bundle/logs/{first}/pytorch.log"].endswith("Z step 1\n")
    assert files[f"bundle/logs/{first}/pytorch.previous.log"].endswith("Z before the restart\n")
    assert json.loads(files["bundle/status.json"])["outcome"] == "running"
    assert {"bundle/objects/jobs.yaml", "bundle/objects/pods.yaml", "bundle/objects/pytorchjobs.yaml"} <= files.keys()


def test_bundle_of_a_detached_release_contains_its_inner_release(fake: FakeApi, helm: FakeHelm) -> None:
    Outer(fake, helm).inner().to_train()
    files = pack()
    assert "demo-run-train-gate" in files["bundle/release-run/hooks.yaml"]
    assert "mode: attached" in files["bundle/release/config/values.yaml"]


def test_bundle_contains_the_stages_manifests_from_their_logs(run: Run, fake: FakeApi) -> None:
    def line(stage: str, finished: str, **facts: str) -> str:
        return f"{stage}: manifest " + json.dumps({"stage": stage, "finished": finished, "facts": facts})

    first, second = run.to_train()
    run.end("train-gate", "x", line("train", "2026-01-01", steps="of an earlier one"), "train: done")
    fake.logs[first] = [line("train", "2026-01-01", steps="of an earlier one")]
    fake.logs[second] = [line("train", "2026-01-02", steps="6"), line("train", "x")[:-5]]
    fake.logs["demo-tokenize-x1"] += [line("tokenize", "2025-01-01"), line("tokenize", "2026-01-01", note=TOKENS[0])]
    fake.logs["demo-tokenize-x1"] += ["tokenize: manifest {}", line("../x", "1"), 'tokenize: manifest {"stage": "x"}']
    files = pack()
    told = {name: json.loads(text) for name, text in files.items() if name.startswith("bundle/stages/")}
    assert {name: (one["stage"], one["finished"], one["facts"]) for name, one in told.items()} == {
        "bundle/stages/train.json": ("train", "2026-01-02", {"steps": "6"}),
        "bundle/stages/tokenize.json": ("tokenize", "2026-01-01", {"note": "hf_(redacted)"}),
    }


def test_bundle_contains_no_planted_token_wherever_it_was_planted(run: Run, fake: FakeApi, helm: FakeHelm) -> None:
    first, _ = run.to_train()
    everything = " ".join(TOKENS)
    env = [{"name": "WANDB_API_KEY", "value": SECRET}, {"name": "NOTE", "value": TOKENS[0]}]
    run.values = {**run.values, "stageDefaults": {"extraEnv": {"MY_SECRET": SECRET, "NOTE": everything}}}
    run.values["image"] = {"repository": f"{ACCOUNT}.dkr.ecr.us-west-2.amazonaws.com/llama-lora"}
    run.record()
    fake.merge("pods", first, {"spec": {"containers": [{"name": "pytorch", "env": env}]}})
    fake.merge(
        "pods", first, {"metadata": {"annotations": {"kubectl.kubernetes.io/last-applied-configuration": SECRET}}}
    )
    fake.merge("jobs", "demo-tokenize", {"metadata": {"annotations": {"note": everything, everything: "x"}}})
    fake.logs[first] = [everything, f"HF_TOKEN={SECRET}", f"password: '{SECRET}'", f"https://u:{SECRET}@host/x"]
    fake.logs[first] += [
        f'"aws_secret_access_key": "{SECRET}"',
        f"Authorization: Bearer {SECRET}",
        f"arn:aws:iam::{ACCOUNT}:x",
    ]
    fake.logs[first] += [f"https://b.s3.amazonaws.com/k?X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET}"]
    fake.add("events", {"metadata": {"name": "e"}, "involvedObject": {"name": "demo-x"}, "message": everything})
    fake.add("secrets", {"metadata": {"name": "hf-token"}, "data": {"token": SECRET}})
    files = pack()
    for planted in [*TOKENS, SECRET, ACCOUNT]:
        assert [name for name, text in files.items() if planted in text] == [], planted
    assert "secrets" not in {request[1] for request in fake.requests}
    with gzip.open("b.tar.gz") as unpacked:  # including names in the archive
        whole = unpacked.read().decode()
    assert not [planted for planted in [*TOKENS, SECRET, ACCOUNT] if planted in whole]


KEY = "wJalrXUtnFEMI/K7MDENG/" + "bPxRfiCYplantedKEY"  # 40 characters, as an AWS secret access key
PLANTED = [
    *TOKENS,
    KEY,
    f"Authorization: Bearer {KEY}.x",
    f"https://user:{SECRET}@host/x",
    f"https://user:with/{SECRET}@host/x",
    f"HF_TOKEN {SECRET}-7/x",
    f"password={SECRET}",
    f"eyJ{SECRET}.{SECRET}.{SECRET}",
]
# The names by which the objects are found, and fields whose values a server allows only from a list.
STRUCTURE = {
    *("name", "kind", "apiVersion", "labels", "uid", "namespace", "resourceVersion", "phase", "manifest", "hooks"),
    *("type", "status", "restartPolicy", "creationTimestamp", "startedAt", "finishedAt", "generateName", "controller"),
}
UNKNOWN = "planted-in-a-field-of-no-list"


def planted_in(value: Any, name: str = "", *, free: bool = False) -> Any:
    """The object with secrets at the end of every text, and in a field of its own of every map."""
    if isinstance(value, dict):
        grown = {
            key: planted_in(inner, key, free=free or key in redact.FREE) if key not in STRUCTURE else inner
            for key, inner in value.items()
        }
        return grown if free or name in STRUCTURE else {**grown, "somethingNew": UNKNOWN, "other": {"new": UNKNOWN}}
    if isinstance(value, list):
        return [planted_in(inner, name, free=free) for inner in value]
    if isinstance(value, str) and name != "data" and not name.endswith(".yaml"):
        return f"{value} {' '.join(PLANTED)}"
    return value


def test_bundle_contains_no_secret_that_is_planted_in_every_field_of_every_object(
    run: Run, fake: FakeApi, helm: FakeHelm
) -> None:
    first, _ = run.to_train()
    run.values = {**run.values, "stageDefaults": {"extraEnv": {"MY_NOTE": " ".join(PLANTED), "NEURON_X": KEY}}}
    run.record()
    fake.add("nodes", {"metadata": {"name": "node-0", "labels": {"node.kubernetes.io/instance-type": "x"}}})
    fake.add("events", {"metadata": {"name": "e"}, "involvedObject": {"name": "demo-x"}, "reason": "R", "message": "m"})
    fake.add("configmaps", {"metadata": {"name": "c", "labels": {}}, "data": {"other.txt": SECRET}})
    for plural, name in list(fake.objects):
        item = fake.objects[plural, name]
        kept = {key: item["metadata"][key] for key in ("labels", "name", "uid") if key in item["metadata"]}
        grown = planted_in(item)
        grown["metadata"] = {**grown["metadata"], **kept}
        fake.objects[plural, name] = grown
    fake.logs[first] = PLANTED
    files = pack()
    whole = "\n".join(files.values())
    assert len(files) > 12 and "demo-train" in whole
    for secret in (*TOKENS, KEY, SECRET, UNKNOWN):
        assert [name for name, text in files.items() if secret in text] == [], secret


@pytest.mark.parametrize(
    ("kind", "kept"),
    [("Pod", {"spec", "status"}), ("ConfigMap", {"data"}), ("Event", {"reason"}), ("Widget", set()), ("Secret", None)],
)
def test_only_known_fields_of_known_kinds_enter_a_bundle(kind: str, kept: set[str] | None) -> None:
    item = {
        "apiVersion": "v1",
        "kind": kind,
        "metadata": {"name": "x", "managedFields": [SECRET], "annotations": {"a": "b"}, "new": SECRET},
        **{key: {"image": "x"} for key in ("spec", "status", "stringData", "reason", "new")},
        "data": {"run.yaml": "a: 1", "token": SECRET},
    }
    found = redact.selected(item)
    if kept is None:
        assert found is None
        return
    assert found is not None and found.keys() - {"apiVersion", "kind", "metadata"} == kept
    assert SECRET not in str(found)


@pytest.mark.parametrize(
    "text",
    [
        f"HF_TOKEN {SECRET}7", f"AWS_SECRET_ACCESS_KEY {KEY}", f"aws_secret_access_key {KEY[:20]}", KEY, f"key: {KEY}",
        f"AKIA{'0' * 16} {KEY}", f"password {SECRET}9", f"WANDB_API_KEY '{SECRET}1'", f"db-password {SECRET}/x",
        f"found https://user:pa/{SECRET}@host", f"https://{SECRET}-token@github.com/x", "IQoJ" + "b3Jp" * 20,
        f"x-api-key {SECRET}1", f"AIza{'x' * 35}", f"xapp-1-{SECRET}", f"npm_{'x' * 36}",
    ],
)  # fmt: skip
def test_a_secret_after_a_space_or_alone_is_hidden(text: str) -> None:
    told = redact_text(text)
    assert "(redacted)" in told and SECRET not in told and KEY[:20] not in told and "b3Jpb3Jp" not in told
    assert redact_text(told) == told


HEX_KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    "text",
    [
        f"wandb: Paste an API key from your profile and hit enter: {HEX_KEY}", f"wandb login {HEX_KEY}",
        f"api key {HEX_KEY}", f"wandb.login(key={HEX_KEY!r})", f"wandb: using {HEX_KEY}, and {HEX_KEY}.",
        f"W&B (Weights & Biases) {HEX_KEY.upper()}", f"wandb: wandb_v1_{HEX_KEY}",
    ],
)  # fmt: skip
def test_a_key_of_weights_and_biases_is_hidden(text: str) -> None:
    told = redact_text(text)
    assert "(redacted)" in told and HEX_KEY[:20] not in told.lower()
    assert redact_text(told) == told


@pytest.mark.parametrize(
    "text",
    [f"key{TOKENS[1]}", f"{TOKENS[1]}x", f"AWS_{TOKENS[1]}_1", f"A{TOKENS[1]}Z", f"x{TOKENS[1].replace('AK', 'AS')}"],
)
def test_the_id_of_an_aws_key_is_hidden_between_letters(text: str) -> None:
    assert "PLANTED0123" not in redact_text(text) and "(redacted)" in redact_text(text)


@pytest.mark.parametrize(
    "text",
    [
        TOKENS[0].replace("_", "%5F"), TOKENS[0].replace("_", "%255f"), f"authorization=Bearer%20{SECRET}",
        f"https://user%3A{SECRET}%40host/x", KEY.replace("/", "%2F"), f"GET /x?api_key%3D{SECRET}",
        f"https%3A%2F%2Fuser%3A{SECRET}%40host", f"Bearer {SECRET[:6]}%2D{SECRET}", f"q=%22token%22%3A%22{SECRET}%22",
        "".join(f"%{ord(character):02x}" for character in KEY),
    ],
)  # fmt: skip
def test_a_percent_encoded_secret_is_hidden(text: str) -> None:
    told = redact_text(text)
    assert "(redacted)" in told and SECRET not in told and KEY[-10:] not in told and "planted" not in told
    assert redact_text(told) == told


@pytest.mark.parametrize(
    "text",
    [
        "GET /models/org%2Fname%20x?a=1%2C2", "100%25 done", "s3://b/a%20file.csv", "50%ab", "%", "%zz %41",
        'secret "hf-token-1" not found', "the token is missing", "HF_TOKEN not set", "HF_TOKEN from Secret hf-token",
        "a3f5c2d1e4b6978012345678901234567890abcd", "password must be set", "ssh://git@host/x", "token 5 of 12",
        "models/meta-llama--Llama-3.1-8B@0e9e39f249a1", "HF_TOKEN: (redacted)", "per-token 12ms", "api-key required",
        "/workspace/runs/demo/checkpoints/0123456789abcdef/step-000100", "https://host:8080/path", "a@b.example",
    ],
)  # fmt: skip
def test_prose_about_secrets_digests_and_paths_is_unchanged(text: str) -> None:
    assert redact_text(text) == text


@pytest.mark.parametrize(
    "text",
    [
        f"--hf-token={SECRET}", f"{{'SecretAccessKey': '{SECRET}'}}", f'"SessionToken":"{SECRET}"',
        f"api_key: {SECRET}",
        f"AWS_SECRET_ACCESS_KEY={SECRET}", f"my-db-password = {SECRET}", f'{{\\"token\\": \\"{SECRET}\\"}}',
        f"hfToken={SECRET}", f"clientSecret: {SECRET}", f"privateKey: {SECRET}", f"PGPASSWORD={SECRET}",
        f"MYSQL_PWD={SECRET}", f"DB_PASS={SECRET}", f"MY_PW={SECRET}", f"Cookie: a=1; session={SECRET}",
        f"--token {SECRET}", f"run --db-password '{SECRET}' now", f'["--token", "{SECRET}"]', f"- --token\n- {SECRET}",
        f"Authorization: token {SECRET}", f"curl -H 'Authorization: {SECRET}'", f'"auth": "{SECRET}"',
        f"password: 'two {SECRET}'", f'password: "two \\" {SECRET}"', f"password: 'it''s {SECRET}'",
        f"password: 'cut {SECRET}", f'{{\\"token\\": \\"two {SECRET}\\"}}', f"a=1 b=2 x:apiKey={SECRET}",
        f"eyJ{SECRET}.{SECRET}.{SECRET}", f"a: 1\n  dbPassword: correct horse {SECRET}\nb: 2",
    ],
)  # fmt: skip
def test_text_after_a_secret_name_is_hidden_in_every_notation(text: str) -> None:
    assert SECRET not in redact_text(text)
    assert redact_text(redact_text(text)) == redact_text(text)


def test_gitlab_tokens_of_every_kind_are_hidden_completely() -> None:
    for kind in ("glpat-", "glrt-", "glcbt-64_", "SIE-glpat-"):  # GitLab's, and with an instance's own prefix
        token = kind + "planted_0123456-planted"
        told = redact_text(f"pip: https://x/{token}.git, {token}.01.0a1b2c3d4 and so on.")
        assert "planted" not in told and "0a1b2c3d4" not in told and told.endswith(" and so on.")
    assert redact_text("glpat- is a prefix, glft-short is none") == "glpat- is a prefix, glft-short is none"


def test_a_quoted_secret_is_hidden_completely_and_the_text_after_it_stays() -> None:
    assert redact_text("password: 'two words here', n: 1") == "password: '(redacted)', n: 1"
    assert redact_text("x Authorization: token abcdef, more\nnext") == "x Authorization: (redacted)\nnext"


@pytest.mark.parametrize(
    "text",
    [
        f"s3://sagemaker-us-west-2-{ACCOUNT}/rows", f"bucket-{ACCOUNT}", f"{ACCOUNT}-logs", f"x_{ACCOUNT}_y",
        f"{ACCOUNT}.dkr.ecr.us-west-2.amazonaws.com/x", f"arn:aws:iam::{ACCOUNT}:role/x", f"logs.{ACCOUNT}.json",
    ],
)  # fmt: skip
def test_an_account_number_is_hidden_inside_every_name(text: str) -> None:
    assert redact_text(text) == text.replace(ACCOUNT, "000000000000")


@pytest.mark.parametrize(
    "key", ["DB_PASS", "hfToken", "secretKey", "auth", "Authorization", "clientSecret", "identitytoken", "MY_PW"]
)
def test_objects_have_no_values_under_secret_names_in_any_spelling(key: str) -> None:
    assert redact_object({key: SECRET}) == {key: "(redacted)"}
    assert redact_object({"name": key, "value": SECRET}) == {"name": key, "value": "(redacted)"}
    arguments = ["run", f"--{key}", SECRET, "--r", "8"]
    assert redact_object({"args": arguments}) == {"args": ["run", f"--{key}", "(redacted)", "--r", "8"]}
    assert redact_object({"labels": {key: SECRET, "team": "a"}}) == {"labels": {key: "(redacted)", "team": "a"}}


@pytest.mark.parametrize(
    "item",
    [
        {"tolerations": [{"key": "aws.amazon.com/neuron", "operator": "Exists"}], "topologyKey": "zone"},
        {"automountServiceAccountToken": False, "imagePullSecrets": [{"name": "registry"}]},
        {"volumes": [{"secret": {"secretName": "hf-token"}}], "huggingFace": {"tokenSecret": "hf-token"}},
        {"env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf-token", "key": "token"}}}]},
        {"tokensPerSecond": 5120.5, "max_tokens": 5, "tokenKey": "token", "name": "x", "nodeSelector": {"team": "a"}},
        {"args": ["--max-new-tokens", "128", "--token", "--verbose"]},
    ],
)
def test_fields_of_objects_that_a_bug_report_needs_are_shown(item: dict[str, Any]) -> None:
    assert redact_object(item) == item
    assert redact_text(yaml.safe_dump(item)) == yaml.safe_dump(item)


@pytest.mark.parametrize(
    "piece",
    [
        *("a_", "-", "ab-token_", "token=", "https://", "x" * 50 + " ", "hf_", "A" * 30 + "/+", "token='", "--token "),
        *(
            "token: |\n a\n",
            "eyJ",
            "eyJ0000000.",
            "a ",
            "A",
            "1",
            "a-1",
            "authorization:",
            "token=\\'",
            "\n",
            "a ,\n",
            "cookie:",
        ),
        *("%41", "%", "%25", "wandb ", "api key\n", "AKIA", "0" * 39 + " "),
    ],
)
def test_a_long_log_is_redacted_in_linear_time(piece: str) -> None:
    began = time.monotonic()
    redact_text(piece * (100_000 // len(piece)))
    assert time.monotonic() - began < 2  # 0.1 s alone; in quadratic time many minutes


@pytest.mark.parametrize(
    "text",
    [
        "eos_token: </s>", "max_new_tokens=128", "tokensPerSecond: 5120", "tokenSecret: hf-token", "tokenKey: token",
        "763104351884.dkr.ecr.us-west-2.amazonaws.com/huggingface", "read 1234567890123 bytes", "5120 tokens/s",
        "uid: 1c2d3e4f-0000-4000-8000-123456789012", "loss 0.123456789012", "123456789012.5 FLOPs",
        f"sha256:{'a1' * 10}{'123456789012'}{'b' * 32}", "fs-012345678901abcde", "max_tokens: 5", "author: me",
        "authentication modes: API_AND_CONFIG_MAP", "PWD=/workspace", "loss per token: 1.25", "second pass: 12",
        "secretName: hf-token", "--max-new-tokens 128", "token\nnext: line", "secret:\n  secretName: x",
    ],
)  # fmt: skip
def test_text_without_secrets_is_unchanged(text: str) -> None:
    assert redact_text(text) == text


def test_text_under_an_unlisted_name_is_hidden_and_the_structure_is_kept() -> None:
    item = {
        "env": [{"name": "MY_SETTING", "value": "x"}, {"name": "NCCL_DEBUG", "value": "INFO"}],
        "extraEnv": {"MY_SETTING": "x", "NEURON_RT_LOG_LEVEL": "INFO"},
        "annotations": {"example.com/note": "x", "llama-lora/stage": "train"},
        "n": [1, None, True],
        "eos_token": "s",
        "anything": {"else": "x", "count": 3, "nothing": ""},
    }
    assert redact_object(item) == {
        "env": [{"name": "MY_SETTING", "value": "(redacted)"}, {"name": "NCCL_DEBUG", "value": "INFO"}],
        "extraEnv": {"MY_SETTING": "(redacted)", "NEURON_RT_LOG_LEVEL": "INFO"},
        "annotations": {"example.com/note": "(redacted)", "llama-lora/stage": "train"},
        "n": [1, None, True],
        "eos_token": "s",
        "anything": {"else": "(redacted)", "count": 3, "nothing": ""},
    }
    assert redact_object({"token": ""}) == {"token": ""}
    assert redact_object({"token": 12345678, "secret": "x"}) == {"token": "(redacted)", "secret": "(redacted)"}


def test_a_yaml_file_in_a_config_map_is_redacted_field_by_field() -> None:
    hidden = redact_object({"data": {"run.yaml": f"model: {{id: a/b}}\nextra: {SECRET}\n", "x": "y"}})
    assert yaml.safe_load(hidden["data"]["run.yaml"]) == {"model": {"id": "a/b"}, "extra": "(redacted)"}
    assert hidden["data"]["x"] == "(redacted)"
    assert redact_object({"run.yaml": "a: ["}) == {"run.yaml": "(redacted)"}


def test_every_text_setting_of_the_chart_is_shown_so_that_values_can_be_replayed() -> None:
    free = {"annotations", "podAnnotations", "extraEnv"}

    def changed(before: Any, after: Any, place: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        if isinstance(before, dict):
            return [one for key in before if key not in free for one in changed(before[key], after[key], (*place, key))]
        if isinstance(before, list):
            pairs = zip(before, after, strict=True)
            return [one for item, shown in pairs for one in changed(item, shown, place)]
        return [] if before == after or ACCOUNT_IN_CI in str(before) else [place]

    for file in (CHART / "values.yaml", *(CHART / "ci").glob("*.yaml"), *(ROOT / "values").glob("*.values.yaml")):
        values = yaml.safe_load(file.read_text())
        assert changed(values, redact_object(values)) == [], file


def test_the_same_state_gives_the_same_bytes_readable_only_by_the_owner(run: Run) -> None:
    run.through("preflight")
    pack()
    first = Path("b.tar.gz").read_bytes()
    pack()
    assert Path("b.tar.gz").read_bytes() == first
    assert stat.S_IMODE(Path("b.tar.gz").stat().st_mode) == 0o600
    assert [path.name for path in Path().iterdir() if "partial" in path.name] == []


def test_what_cannot_be_read_is_listed_and_the_rest_is_packed(
    run: Run, fake: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    run.to_train()
    fake.forbidden |= {("list", "nodes"), ("get", "pods/log"), ("list", "configmaps")}
    files = pack()
    for resource in ("nodes", "pods/log", "configmaps"):
        assert resource in files["bundle/not-read.txt"]
    assert "bundle/objects/jobs.yaml" in files
    assert capsys.readouterr().err.count("not read: ") == len(files["bundle/not-read.txt"].splitlines())


def test_the_end_of_a_long_log_is_kept(run: Run, fake: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "LOG_BYTES", 100)
    first, _ = run.to_train()
    fake.logs[first] = [f"line {number}" for number in range(100)]
    log = pack()[f"bundle/logs/{first}/pytorch.log"]
    assert log.endswith(" line 99\n") and len(log) <= 100 and log.startswith("2025-")


def test_json_names_the_archive_and_its_files(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    pack("--json")
    document = json.loads(capsys.readouterr().out)
    assert document["file"] == "b.tar.gz" and "bundle/values.yaml" in document["files"]


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("folder", "-o folder: cannot be written: is a directory. Name a file"),
        ("no/such.tar.gz", "-o no/such.tar.gz: cannot be written: no such folder: no. Name a file"),
        ("read-only.tar.gz", "-o read-only.tar.gz: cannot be written: the existing file is read-only (mode 444)."),
        ("closed/b.tar.gz", "-o closed/b.tar.gz: cannot be written: the folder closed is not writable."),
    ],
)
def test_an_output_that_cannot_be_written_is_one_line_before_any_request(
    run: Run,
    fake: FakeApi,
    helm: FakeHelm,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    said: str,
) -> None:
    Path("folder").mkdir()
    Path("closed").mkdir()
    Path("read-only.tar.gz").touch(mode=0o444)
    access = os.access  # root, which may run the tests, may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed" and access(path, mode))
    assert genvalues("bundle", "demo", "-n", "team-a", "-o", output) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)
    assert not fake.requests and not helm.calls
    assert not Path("no").exists()


# --- replayed


def archive(files: dict[str, Any], path: str = "b.tar.gz") -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return Path(path)


def about(**changes: Any) -> str:
    return json.dumps({"format": 1, "release": "demo", "chart": "0.1.0", **changes})


def test_values_of_a_bundle_are_replayed_with_the_name_of_the_release(run: Run) -> None:
    pack()
    values = local_values.values_of_bundle(Path("b.tar.gz"), CHART)
    assert values["name"] == "demo" and values["model"] == {"id": "org/model"}


def test_another_chart_version_and_redacted_values_give_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    packed = archive({"bundle/about.json": about(chart="9.9.9"), "bundle/values.yaml": "note: (redacted)\n"})
    local_values.values_of_bundle(packed, CHART)
    first, second = capsys.readouterr().err.splitlines()
    assert "b.tar.gz" in first and "9.9.9" in first and "redacted" in second


def test_a_bundle_without_chart_version_gives_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    packed = archive({"bundle/about.json": about(chart=None), "bundle/values.yaml": "a: 1\n"})
    local_values.values_of_bundle(packed, CHART)
    (line,) = capsys.readouterr().err.splitlines()
    assert "b.tar.gz does not name its chart version" in line and "None" not in line


@pytest.mark.parametrize("of", [2, 0, "1", None, True, 1.0, [1]])
def test_a_bundle_of_another_format_is_refused_and_the_version_that_wrote_it_named(of: Any) -> None:
    packed = archive({"bundle/about.json": about(format=of, genvalues="9.9.9"), "bundle/values.yaml": "a: 1"})
    with pytest.raises(UserError, match=r"of format .*reads format 1.*9\.9\.9"):
        bundle.read_bundle(packed)


def test_a_bundle_without_format_is_refused() -> None:
    packed = archive({"bundle/about.json": '{"chart": "0.1.0"}', "bundle/values.yaml": "a: 1"})
    with pytest.raises(UserError, match="of format none"):
        bundle.read_bundle(packed)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "it does not begin with"),
        ({"bundle/about.json": about()}, "it does not begin with"),
        ({"bundle/about.json": "{", "bundle/values.yaml": "a: 1"}, "is not a bundle"),
        ({"bundle/about.json": "[]", "bundle/values.yaml": "a: 1"}, "it does not begin with"),
        ({"bundle/about.json": about(), "bundle/values.yaml": b"\xff\xfe"}, "is not a bundle"),
        ({"../bundle/about.json": about(), "/bundle/values.yaml": "a: 1"}, "it does not begin with"),
        ({f"x{number}": "" for number in range(9)} | {"bundle/values.yaml": "a: 1"}, "it does not begin with"),
        ({"bundle/about.json": about(), "bundle/values.yaml": bytes(17 << 20)}, "is not a bundle"),
    ],
)
def test_other_archives_and_too_large_ones_are_one_line_and_write_nothing(files: dict[str, Any], said: str) -> None:
    packed = archive(files)
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError) as error:
        bundle.read_bundle(packed)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    "content",
    [b"", b"text", gzip.compress(b"text", mtime=0), gzip.compress(b"x" * 2000, mtime=0)[:-9]],
    ids=["empty", "text", "no tar", "cut off"],
)
def test_a_broken_archive_is_one_line(content: bytes) -> None:
    Path("b.tar.gz").write_bytes(content)
    with pytest.raises(UserError):
        bundle.read_bundle(Path("b.tar.gz"))
    with pytest.raises(UserError, match="cannot be read: No such file"):
        bundle.read_bundle(Path("nowhere.tar.gz"))


def test_a_link_in_an_archive_is_not_followed() -> None:
    with tarfile.open("b.tar.gz", "w:gz") as tar:
        for name in ("bundle/about.json", "bundle/values.yaml"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
            tar.addfile(info)
    with pytest.raises(UserError, match="does not begin with"):
        bundle.read_bundle(Path("b.tar.gz"))


NEURON = """
name: demo
instance: trn1.32xlarge
backend: neuron
model: {id: org/model}
dataset: {source: org/rows, format: text}
training: {attention: flash, perDeviceBatchSize: 2}
parallelism: {nodes: 2, processesPerNode: 32, tensorParallelSize: 8, dataParallelSize: 8}
devices: {aws.amazon.com/neuron: 16, vpc.amazonaws.com/efa: 8}
rehearse: {enabled: true}
"""


@pytest.mark.parametrize("form", ["values", "bundle"])
def test_values_for_trainium_need_a_flag_and_then_run_on_the_cpu_as_one_process(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("values.yaml").write_text(NEURON)
    file = Path("values.yaml")
    if form == "bundle":
        file = archive({"bundle/about.json": about(), "bundle/values.yaml": NEURON})
    monkeypatch.setattr(local_values, "NEURON_DEVICE", Path("nowhere"))
    with pytest.raises(UserError) as error:
        rendered_objects(Sources((file,), chart=CHART), False)
    assert str(error.value).endswith("--cpu")
    objects = rendered_objects(Sources((file,), chart=CHART), True)
    train = next(item for item in objects if item["kind"] == "PyTorchJob" and "train" in item["metadata"]["name"])
    assert train["spec"]["nprocPerNode"] == "1"
    assert not [item for item in objects if "rehearse" in item["metadata"]["name"]], "the run itself is on a CPU"
    config = next(item["data"]["run.yaml"] for item in objects if "run.yaml" in (item.get("data") or {}))
    assert (
        "backend: native" in config
        and "device: cpu" in config
        and "attention: causal" in config
        and "perDeviceBatchSize: 2" in config
    )


def test_values_for_trainium_run_unchanged_on_a_trainium_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Path("values.yaml").write_text(NEURON)
    monkeypatch.setattr(local_values, "NEURON_DEVICE", tmp_path)
    objects = rendered_objects(Sources((Path("values.yaml"),), chart=CHART), False)
    assert next(item for item in objects if item["kind"] == "PyTorchJob")["spec"]["nprocPerNode"] == "32"
