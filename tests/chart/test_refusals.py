"""What cannot work is refused before anything is installed, by both Helms, with the key and the fix."""

from __future__ import annotations

import re

import pytest

from chart.manifests import CHART, MINIMAL, Refused, Values, merged, pods, render

# By the schema: values, and the key that the message must name.
MISFITS: dict[str, tuple[Values, str]] = {
    "unknown section": ({"trainning": {}}, "trainning"),
    "unknown key": ({"lora": {"rank": 8}}, "rank"),
    "unknown stage": ({"stages": {"rehearse": {}}}, "rehearse"),
    "unknown key of a stage": ({"stages": {"train": {"replicas": 2}}}, "replicas"),
    "text for a number": ({"training": {"learningRate": "5e-5 or so"}}, "learningRate"),
    "number for text": ({"model": {"revision": 20241001}}, "revision"),
    "text for a truth value": ({"training": {"packing": "False"}}, "packing"),
    "fraction of a step": ({"training": {"saveSteps": 1.5}}, "saveSteps"),
    "learning rate 0": ({"training": {"learningRate": 0}}, "learningRate"),
    "maxSteps 0": ({"training": {"maxSteps": 0}}, "maxSteps"),
    "no LoRA rank": ({"lora": {"r": 0}}, "lora.r"),
    "dropout 1": ({"lora": {"dropout": 1}}, "dropout"),
    "unknown module": ({"lora": {"targetModules": ["attention"]}}, "targetModules"),
    "no modules": ({"lora": {"targetModules": []}}, "targetModules"),
    "everything held out": ({"dataset": {"evalFraction": 1}}, "evalFraction"),
    "unknown format": ({"dataset": {"format": "alpaca"}}, "format"),
    "unknown column": ({"dataset": {"columns": {"question": "q"}}}, "question"),
    "unknown backend": ({"backend": "cuda"}, "backend"),
    "unknown mode": ({"pipeline": {"mode": "background"}}, "mode"),
    "no instance type": ({"instance": "trn1"}, "instance"),
    "tag in the repository": ({"image": {"repository": "llama-lora:v1"}}, "repository"),
    "short digest": ({"image": {"digest": "sha256:abc"}}, "digest"),
    "relative model path": ({"model": {"id": "", "path": "models/llama"}}, "path"),
    "a token where its Secret is named": ({"huggingFace": {"tokenSecret": "hf_AbCdEfGhIj"}}, "tokenSecret"),
    "no processes": ({"parallelism": {"processesPerNode": 0}}, "processesPerNode"),
    "device without a domain": ({"devices": {"neuron": 1}}, "neuron"),
    "half a device": ({"devices": {"aws.amazon.com/neuron": 0.5}}, "devices"),
    "devices of a stage that does not train": (
        {"stages": {"merge": {"resources": {"limits": {"aws.amazon.com/neuron": 16}}}}},
        "aws.amazon.com/neuron",
    ),
    "no quantity": ({"stageDefaults": {"resources": {"limits": {"memory": "lots"}}}}, "memory"),
    "a folder of the node": (
        {"stages": {"train": {"extraVolumes": {"dev": {"hostPath": {"path": "/dev"}}}}}},
        "hostPath",
    ),
    "root": ({"securityContext": {"runAsUser": 0}}, "runAsUser"),
    "a cleanup that gives up before a train pod has saved": ({"cleanup": {"timeoutSeconds": 110}}, "timeoutSeconds"),
    "dots in the compile cache's path": ({"workspace": {"mountPath": "/mnt/v1.0"}}, "mountPath"),
    "unknown kind of storage": ({"storage": {"kind": "efs"}}, "kind"),
    "unknown key of storage": ({"storage": {"claim": "x"}}, "claim"),
    "unknown key of FSx": ({"storage": {"fsx": {"throughput": 1}}}, "throughput"),
    "on, which Helm takes for true": ({"compile": {"true": "cpu"}}, "compile"),
    "unknown attention": ({"training": {"attention": "flash_attention_2"}}, "attention"),
    "a limit of nothing": ({"guards": {"maxCost": 0}}, "maxCost"),
    "a time in bare seconds": ({"guards": {"stallTimeout": 1800}}, "stallTimeout"),
    "a price with its currency": ({"guards": {"pricePerNodeHour": "$21.50"}}, "pricePerNodeHour"),
    "no size": ({"storage": {"size": "big"}}, "size"),
    "no access mode": ({"storage": {"accessModes": []}}, "accessModes"),
    "full name too long for worker pods": ({"fullnameOverride": "x" * 39}, "fullnameOverride"),
    "full name that no Service can have": ({"fullnameOverride": "1st"}, "fullnameOverride"),
    "run name that leaves its folder": ({"name": "../other"}, "name"),
}

# By the templates: values, and the whole message.
NEURON: Values = {"instance": "trn1.32xlarge", "backend": "neuron", "devices": {"aws.amazon.com/neuron": 16}}
CONTRADICTIONS: dict[str, tuple[Values, str]] = {
    "no model": ({"model": {"id": ""}}, "model.id is empty. Set it, e.g. --set model.id="),
    "two models": ({"model": {"path": "/a"}}, "model.id and model.path are both set. Keep one"),
    "revision of a path": (
        {"model": {"id": "", "path": "/a", "revision": "main"}},
        "model.revision is set, but a model.path has no revisions. Remove model.revision.",
    ),
    "no dataset": ({"dataset": {"source": ""}}, "dataset.source is empty. Set it, e.g. --set dataset.source="),
    "no format": ({"dataset": {"format": ""}}, "dataset.format is empty. Set it to text, instruction,"),
    "nothing to evaluate on": (
        {"dataset": {"evalFraction": 0}},
        "evaluation.enabled is true, but dataset.evalFraction 0 holds no rows out. Raise dataset.evalFraction, or",
    ),
    "processes that do not fit the copies": (
        {"parallelism": {"nodes": 2, "processesPerNode": 4, "tensorParallelSize": 1, "dataParallelSize": 4}},
        "parallelism.nodes * parallelism.processesPerNode = 8 processes, but parallelism.tensorParallelSize * "
        "parallelism.dataParallelSize = 4. Set parallelism.dataParallelSize to 8.",
    ),
    "tensor parallelism that does not divide": (
        merged(NEURON, {"parallelism": {"processesPerNode": 32, "tensorParallelSize": 5, "dataParallelSize": 6}}),
        "parallelism.dataParallelSize = 30. Make parallelism.tensorParallelSize a divisor of 32.",
    ),
    "tensor parallelism on CPUs": (
        {"parallelism": {"tensorParallelSize": 2, "dataParallelSize": 1}},
        "parallelism.tensorParallelSize is 2, but backend cpu is data parallel only. Set it to 1, or",
    ),
    "Neuron without devices": (
        merged(NEURON, {"devices": None}, {"devices": {"vpc.amazonaws.com/efa": 8}}),
        "devices has no aws.amazon.com/neuron, which backend neuron needs. Set devices to those of one node",
    ),
    "Neuron on CPUs": (
        merged(NEURON, {"instance": "cpu"}),
        "instance is cpu, but backend is neuron. Set instance to the nodes' type",
    ),
    "the resource that the seed asks for": (
        merged(NEURON, {"devices": {"aws.amazon.com/neurondevice": 16}}),
        "devices.aws.amazon.com/neurondevice is not what the Neuron device plugin offers whole nodes by. Use",
    ),
    "no volume": (
        {"storage": {"enabled": False}},
        "storage.enabled is false and storage.existingClaim is empty. Name the claim to use in storage.existingClaim",
    ),
    "a size that FSx does not have": (
        {"storage": {"size": "3600Gi"}},
        "storage.size 3600Gi is no size of FSx for Lustre. Use 1200Gi, 2400Gi or a multiple of 2400Gi.",
    ),
    "an FSx size in Ti": ({"storage": {"size": "3Ti"}}, "storage.size 3Ti is no size of FSx for Lustre."),
    "FSx without a class": ({"storage": {"storageClass": ""}}, "storage.storageClass is empty, which storage.kind fsx"),
    "static without a file system": (
        {"storage": {"kind": "fsx-static", "static": {"dnsName": "a.b", "mountName": "fsx"}}},
        "storage.static.fileSystemId is empty, which storage.kind fsx-static needs.",
    ),
    "flash on CPUs": (
        {"training": {"attention": "flash"}},
        "training.attention is flash, which backend cpu does not have. Set it to eager.",
    ),
    "flash with rows that its kernel does not take": (
        merged(NEURON, {"training": {"attention": "flash", "maxSequenceLength": 3000}}),
        "training.maxSequenceLength 3000 is no multiple of 2048, which training.attention flash needs. Set it to 4096",
    ),
    "graphs for another instance": (
        merged(NEURON, {"instance": "ml.trn2.48xlarge"}),
        "neuron.target is trn1, but instance is ml.trn2.48xlarge. Set neuron.target to trn2, and",
    ),
    "graphs of trn2 for trn1": (
        merged(NEURON, {"neuron": {"target": "trn2", "logicalCoreSize": 2}}),
        "neuron.target is trn2, but instance is trn1.32xlarge. Set neuron.target to trn1.",
    ),
    "logical cores of two on trn1": (
        merged(NEURON, {"neuron": {"logicalCoreSize": 2}}),
        "neuron.logicalCoreSize is 2, but neuron.target trn1 has cores of one only. Set it to 1.",
    ),
    "nodes without EFA": (
        merged(NEURON, {"parallelism": {"nodes": 2, "dataParallelSize": 4}}),
        "devices has no vpc.amazonaws.com/efa, without which 2 nodes (parallelism.nodes) cannot train together. Set it",
    ),
    "another cache of graphs": (
        merged(NEURON, {"stageDefaults": {"extraEnv": {"NEURON_COMPILE_CACHE_URL": "s3://bucket/cache"}}}),
        "stages.train: extraEnv.NEURON_COMPILE_CACHE_URL is set by the chart. Remove it: the cache is below",
    ),
    "another cache of graphs, by a flag": (
        merged(NEURON, {"stageDefaults": {"extraEnv": {"NEURON_CC_FLAGS": "-O1 --cache_dir=/workspace/mine"}}}),
        "stages.compile: extraEnv.NEURON_CC_FLAGS moves the compiler's cache, by --cache_dir, away from where the "
        "stages look for it. Remove --cache_dir.",
    ),
    "other logical cores by the environment": (
        merged(NEURON, {"stageDefaults": {"extraEnv": {"NEURON_LOGICAL_NC_CONFIG": 1}}}),
        "stages.compile: extraEnv.NEURON_LOGICAL_NC_CONFIG is set by the chart. Use neuron.logicalCoreSize.",
    ),
    "bf16 as the seed asks for it": (
        merged(NEURON, {"stages": {"train": {"extraEnv": {"XLA_USE_BF16": 1}}}}),
        "stages.train: extraEnv.XLA_USE_BF16 has been out of use since Neuron 2.25, and would spoil what is kept",
    ),
    "compiler flags of one stage alone": (
        merged(NEURON, {"stages": {"compile": {"extraEnv": {"NEURON_CC_FLAGS": "-O1"}}}}),
        "stages.compile and stages.train differ in extraEnv.NEURON_CC_FLAGS, so that train's graphs would not be those",
    ),
    "more shared memory than memory": (
        {"sharedMemory": "17Gi"},
        "sharedMemory 17Gi is more than stages.train: resources.limits.memory 16Gi, against which it counts. Set it",
    ),
    "a limit on what nobody knows the price of": (
        {"guards": {"maxCost": 200}},
        "guards.maxCost is 200, but guards.pricePerNodeHour, which the cost is counted by, is empty. Set it to the "
        "dollars that one cpu node costs an hour, or guards.maxCost to null.",
    ),
    "a time that is no duration": (
        {"guards": {"stallTimeout": "half an hour"}},
        "guards.stallTimeout half an hour is no duration. Set it to one like 45m or 1h30m, or leave it empty for none.",
    ),
    "a time in an order that nobody reads": (
        {"guards": {"stallTimeout": "30m1h"}},
        "guards.stallTimeout 30m1h is no duration. Set it to one like 45m",
    ),
    "no time at all": (
        {"guards": {"stallTimeout": "0h0m"}},
        "guards.stallTimeout 0h0m would end every training at once. Set it to e.g. 30m, or leave it empty for none.",
    ),
    "a class without a subnet": (
        {"storage": {"fsx": {"createStorageClass": True, "securityGroupIds": ["sg-01234567"]}}},
        "storage.fsx.subnetId is empty, which storage.fsx.createStorageClass needs.",
    ),
    "a class without security groups": (
        {"storage": {"fsx": {"createStorageClass": True, "subnetId": "subnet-01234567"}}},
        "storage.fsx.securityGroupIds is empty, which storage.fsx.createStorageClass needs.",
    ),
    "a volume of one node for two": (
        {
            "parallelism": {"nodes": 2, "dataParallelSize": 4},
            "storage": {"kind": "generic", "accessModes": ["ReadWriteOnce"]},
        },
        "storage.accessModes lacks ReadWriteMany, which 2 nodes (parallelism.nodes) need. Add it",
    ),
    "rights made by nobody": (
        {"rbac": {"create": False}},
        "rbac.namePrefix is empty, which rbac.create false needs. Set it to",
    ),
    "a token in the values": (
        {"stages": {"tokenize": {"extraEnv": {"HF_TOKEN": "hf_x"}}}},
        "stages.tokenize.extraEnv.HF_TOKEN looks like a secret, and values are no place for one. Put a Hugging Face",
    ),
    "a key for all stages": (
        {"stageDefaults": {"extraEnv": {"AWS_SECRET_ACCESS_KEY": "x"}}},
        "stageDefaults.extraEnv.AWS_SECRET_ACCESS_KEY looks like a secret",
    ),
    "a relative file": (
        {"dataset": {"source": "data/rows.jsonl"}},
        "dataset.source data/rows.jsonl is a relative path, and pods cannot see this computer's files. Put the file",
    ),
    "a workspace over the config": (
        {"workspace": {"mountPath": "/etc/llama-lora"}},
        "workspace.mountPath /etc/llama-lora is where the chart mounts something else. Use another path",
    ),
    "a token where it does not look like one": (
        {"dataset": {"config": f"hf_{'x' * 30}"}},
        "dataset.config holds what looks like a token or a key, and values are no place for one. Remove it.",
    ),
    "an access key under an innocent name": (
        {"stages": {"tokenize": {"extraEnv": {"WHO": f"AKIA{'Q' * 16}"}}}},
        "stages.tokenize.extraEnv.WHO holds what looks like a token or a key",
    ),
    "a mount over the chart's own": (
        {
            "stages": {
                "merge": {"extraVolumes": {"a": {"emptyDir": {}}}, "extraVolumeMounts": {"a": {"mountPath": "/tmp"}}}
            }
        },
        "stages.merge: extraVolumeMounts.a.mountPath /tmp is taken by another volume. Choose another path.",
    ),
    "more asked for than allowed": (
        {"stages": {"merge": {"resources": {"requests": {"memory": "9000Mi"}, "limits": {"memory": "8Gi"}}}}},
        "stages.merge: resources.requests.memory 9000Mi is more than resources.limits.memory 8Gi. Raise the limit",
    ),
    "a mount without a volume": (
        {"stages": {"merge": {"extraVolumeMounts": {"scratch": {"mountPath": "/scratch"}}}}},
        "stages.merge: extraVolumeMounts.scratch mounts no volume. Add scratch to extraVolumes.",
    ),
    "a volume named as the chart's own": (
        {"stages": {"merge": {"extraVolumes": {"tmp": {"emptyDir": {}}}}}},
        "stages.merge: extraVolumes.tmp has the name of a volume of the chart's own. Choose another.",
    ),
    "another workspace by the environment": (
        {"stages": {"merge": {"extraEnv": {"LLAMA_LORA_WORKSPACE": "/elsewhere"}}}},
        "stages.merge: extraEnv.LLAMA_LORA_WORKSPACE is set by the chart. Use workspace.mountPath.",
    ),
}


LONG_NAME = "pipeline.mode detached needs a release name of at most 49 characters"


def refusal(values: Values, helm: int, release: str = "llama") -> str:
    with pytest.raises(Refused) as refused:
        render(merged(MINIMAL, values), helm=helm, release=release)
    return str(refused.value)


@pytest.mark.parametrize(("values", "key"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_the_schema_is_refused_by_its_key(values: Values, key: str, helm: int) -> None:
    message = refusal(values, helm)
    assert "the schema" in message
    findings = [line for line in message.splitlines() if line.startswith("- ")]
    assert findings and all(key in line.replace("/", ".") or key in line for line in findings), message


@pytest.mark.parametrize(("values", "words"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_keys_that_contradict_each_other_are_refused_with_the_fix(values: Values, words: str, helm: int) -> None:
    assert words in refusal(values, helm)


def test_all_contradictions_are_told_at_once(helm: int) -> None:
    values: Values = {"model": {"id": ""}, "dataset": {"format": ""}, "storage": {"enabled": False}}
    message = refusal(values, helm)
    for key in ("model.id", "dataset.format", "storage.existingClaim"):
        assert key in message


def test_a_release_name_too_long_for_the_runners_is_refused(helm: int) -> None:
    message = refusal({"pipeline": {"mode": "detached"}}, helm, release="r" * 50)
    assert LONG_NAME in message
    assert render(merged(MINIMAL, {"pipeline": {"mode": "detached"}}), helm=helm, release="r" * 49)


def test_every_message_has_a_fix_and_a_test() -> None:
    text = (CHART / "templates/_validations.tpl").read_text()
    text = re.sub(r"\{\{- /\*.*?\*/\}\}", "", text, flags=re.DOTALL)
    messages = [line for line in text.splitlines() if line and not line.startswith("{{-")]
    assert len(messages) > 20
    tested = " ".join(words for _, words in CONTRADICTIONS.values()) + LONG_NAME
    for message in messages:
        verbs = r"\b(Set|Keep|Remove|Use|Name|Give|Add|Choose|Raise|Put)\b|describe-file-systems|\$fix"
        assert re.search(verbs, message.partition(". ")[2]), f"no fix: {message}"
        literal = [part.strip()[:30] for part in re.split(r"\{\{.*?\}\}", message) if part.strip(" .")]
        assert any(part in tested for part in literal), f"not tested: {message}"


# Put together here, so that whoever looks for tokens in this repository finds none.
TOKENS = {
    "Hugging Face": "hf_" + "aB3" * 12,
    "AWS": "AK" + "IA" + "ABCDEFGH12345678",
    "AWS, for a session": "AS" + "IA" + "ABCDEFGH12345678",
    "private key": "-----BE" + "GIN OPENSSH PRIVATE KEY-----\nabc",
}


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
def test_what_looks_like_a_token_is_refused_wherever_it_stands_and_never_shown(token: str, helm: int) -> None:
    stages = {"train": {"extraEnv": {"OPTIONS": f"--auth={token}"}}, "merge": {"podAnnotations": {"note": token}}}
    values: Values = {
        "model": {"id": "", "path": f"/workspace/{token}"},
        "dataset": {"source": f"s3://bucket/{token}/rows.jsonl", "config": token, "columns": {"text": token}},
        "storage": {"mountOptions": ["flock", token]},
        "stageDefaults": {"extraEnv": {"WHO": token}},
        "stages": stages,
    }
    message = refusal(values, helm)
    for key in [
        *("model.path", "dataset.source", "dataset.config", "dataset.columns.text", "storage.mountOptions"),
        *("stageDefaults.extraEnv.WHO", "stages.train.extraEnv.OPTIONS", "stages.merge.podAnnotations.note"),
    ]:
        assert f"  {key} holds what looks like a token or a key" in message
    assert token.splitlines()[0] not in message


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "aws_secret_access_key", "AWS_ACCESS_KEY_ID", "APIKEY", "SSH_KEY", "DB_PASSWD"]
)
def test_an_environment_variable_named_like_a_secret_is_refused(name: str, helm: int) -> None:
    message = refusal({"stages": {"train": {"extraEnv": {name: "x"}}}}, helm)
    assert f"stages.train.extraEnv.{name} looks like a secret" in message


def test_what_only_resembles_a_secret_is_taken(helm: int) -> None:
    variables = {"TOKENIZERS_PARALLELISM": False, "MONKEY": "hf_transfer", "WHO": "AKIA"}
    values: Values = {"model": {"id": "hf_org/shelf_" + "a" * 40}, "stageDefaults": {"extraEnv": variables}}
    assert render(merged(MINIMAL, values), helm=helm)


def test_no_volume_may_be_mounted_where_the_chart_or_another_one_is(helm: int) -> None:
    own = {mount["mountPath"] for each in pods(render(MINIMAL)) for mount in each.containers[0]["volumeMounts"]}
    assert len(own) == 4
    for path in [*own - {"/workspace"}, "/etc/llama-lora/work"]:
        assert f"workspace.mountPath {path} is where the chart" in refusal({"workspace": {"mountPath": path}}, helm)
    volumes = {name: {"emptyDir": {}} for name in "abcdefgh"}
    paths = ["/mine", *sorted(own), "/tmp/", "/etc/llama-lora/x", "//mine"]
    mounts = {name: {"mountPath": path} for name, path in zip(volumes, paths, strict=True)}
    message = refusal({"stages": {"merge": {"extraVolumes": volumes, "extraVolumeMounts": mounts}}}, helm)
    for name, path in list(zip(volumes, paths, strict=True))[1:]:
        assert f"extraVolumeMounts.{name}.mountPath {path} is taken" in message
    assert "/mine is taken" not in message.replace("//mine", "")


def of_merge(resource: str, request: object, limit: object) -> Values:
    return {"stages": {"merge": {"resources": {"requests": {resource: request}, "limits": {resource: limit}}}}}


OVER = [("cpu", 2, "1500m"), ("cpu", "1501m", 1.5), ("memory", "1Gi", "1G"), ("memory", "2Ti", "2047Gi")]
WITHIN = [("cpu", "1500m", 1.5), ("cpu", 2, "2"), ("memory", "1G", "1Gi"), ("memory", "1024Mi", "1Gi")]


def test_requests_are_compared_with_limits_as_kubernetes_counts(helm: int) -> None:
    for resource, request, limit in OVER:
        message = refusal(of_merge(resource, request, limit), helm)
        assert f"stages.merge: resources.requests.{resource} {request} is more than resources.limits" in message
    for resource, request, limit in WITHIN:
        assert render(merged(MINIMAL, of_merge(resource, request, limit)), helm=helm)


@pytest.mark.parametrize("source", ["/elsewhere/rows.jsonl", "s3://bucket/rows.csv", "org/rows", "rows", "org/json"])
def test_sources_that_pods_can_reach_are_taken(source: str, helm: int) -> None:
    """`genvalues local` uses absolute paths that are on no volume."""
    assert render(merged(MINIMAL, {"dataset": {"source": source}}), helm=helm)
