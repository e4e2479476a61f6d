"""Rules that span settings: genvalues and the chart refuse the same values. And what a values file may leave out."""

from __future__ import annotations

import re

import pytest

from chart.manifests import CHART, MINIMAL, Refused, Values, config, merged, refused_with, render, together
from chart.test_refusals import UNRENDERED
from genvalues.inputs.chart import on_top_of_defaults
from genvalues.settings.run import RunConfig
from genvalues.settings.value_rules import contradictions

NEURON: Values = {"instance": "trn1.32xlarge", "backend": "neuron", "devices": {"aws.amazon.com/neuron": 16}}
TRN2: Values = {
    "instance": "trn2.48xlarge",
    "devices": {"aws.amazon.com/neuron": 16},
    "neuron": {"target": "trn2", "logicalCoreSize": 2},
}
CLASS: Values = {"createStorageClass": True, "subnetId": "subnet-01234567", "securityGroupIds": ["sg-01234567"]}
ENVIRONMENT = "stages.train.extraEnv"

# Values, and a key that both name.
REFUSED: dict[str, tuple[Values, str]] = {
    "no model": ({"model": {"id": ""}}, "model.id"),
    "two models": ({"model": {"path": "/a"}}, "model.path"),
    "revision of a path": ({"model": {"id": "", "path": "/a", "revision": "main"}}, "model.revision"),
    "no dataset": ({"dataset": {"source": ""}}, "dataset.source"),
    "no format": ({"dataset": {"format": ""}}, "dataset.format"),
    "nothing to evaluate on": ({"dataset": {"evalFraction": 0}}, "evaluation.enabled"),
    "groups of rows that nothing divides": (
        {"dataset": {"evalFraction": 0, "groupColumn": "user"}, "evaluation": {"enabled": False}},
        "dataset.groupColumn",
    ),
    "groups beside a held-out source": (
        {"dataset": {"eval": {"split": "test"}, "groupColumn": "user"}},
        "dataset.groupColumn",
    ),
    "a configuration without a held-out split": ({"dataset": {"eval": {"config": "en"}}}, "dataset.eval.config"),
    "a revision without a held-out split": ({"dataset": {"eval": {"revision": "v1"}}}, "dataset.eval.revision"),
    "held-out rows that are trained on": ({"dataset": {"eval": {"split": "train"}}}, "dataset.eval.split"),
    "the same part of the same source held out": (
        {"dataset": {"source": "a/b", "split": "x[:9]", "eval": {"source": "a/b", "split": "x[:9]"}}},
        "dataset.eval.split",
    ),
    "pieces of conversations": ({"dataset": {"format": "chat", "overlong": "split"}}, "dataset.overlong"),
    "pieces of one source's conversations": (
        {"dataset": {"format": "text", "overlong": "split", "additional": {"x": {"source": "a/b", "format": "chat"}}}},
        "dataset.overlong",
    ),
    "a part without rows": ({"dataset": {"split": "test+train[:0]"}}, "dataset.split"),
    "a part without rows held out": ({"dataset": {"eval": {"split": "train[90%:10%]"}}}, "dataset.eval.split"),
    "a part of another source without rows": (
        {"dataset": {"additional": {"my.x": {"source": "a/b", "split": "train[-10%:90%]"}}}},
        "dataset.additional.my.x.split",
    ),
    "answers of text": ({"dataset": {"format": "text", "trainOn": "last-answer"}}, "dataset.trainOn"),
    "rows that native cannot pad on Trainium": (
        merged(TRN2, {"training": {"maxSequenceLength": 1000}}),
        "training.maxSequenceLength",
    ),
    "flash and odd rows": (
        merged(NEURON, {"training": {"attention": "flash", "maxSequenceLength": 3000}}),
        "training.maxSequenceLength",
    ),
    "flash with a mask and odd rows": (
        merged(NEURON, {"training": {"attention": "isolatedFlash", "maxSequenceLength": 3000}}),
        "training.maxSequenceLength",
    ),
    "flash with a mask on a CPU": ({"training": {"attention": "isolatedFlash"}}, "training.attention"),
    "a held-out loss without held-out rows": (
        {"training": {"evalSteps": 5}, "dataset": {"evalFraction": 0}, "evaluation": {"enabled": False}},
        "training.evalSteps",
    ),
    "the best checkpoint of no measurement": (
        {"training": {"loadBestModelAtEnd": True}},
        "training.loadBestModelAtEnd",
    ),
    "patience without measurements": ({"training": {"earlyStoppingPatience": 2}}, "training.earlyStoppingPatience"),
    "a threshold without patience": (
        {"training": {"evalSteps": 5, "earlyStoppingThreshold": 0.1}},
        "training.earlyStoppingThreshold",
    ),
    "processes and copies": ({"parallelism": {"nodes": 3, "dataParallelSize": 4}}, "parallelism.nodes"),
    "shards that do not divide the copies": ({"parallelism": {"shardSize": 3}}, "parallelism.shardSize"),
    "shards of xla": (
        merged(NEURON, {"parallelism": {"shardSize": 2}}),
        "parallelism.shardSize",
    ),
    "auto-resume of a TrainJob": (
        {"workload": "trainjob", "instance": "ml.trn2.48xlarge", "hyperpod": {"autoResume": True}},
        "hyperpod.autoResume",
    ),
    "xla on CPUs": (merged(NEURON, {"instance": "cpu"}), "backend"),
    "xla on other accelerators": (merged(NEURON, {"instance": "p5.48xlarge"}), "backend"),
    "Trainium without its devices": (merged(TRN2, {"devices": None}, {"devices": {"a.com/b": 1}}), "devices"),
    "more devices than the node has": (
        {"instance": "trn1.32xlarge", "devices": {"aws.amazon.com/neuron": 99}},
        "devices.aws.amazon.com/neuron",
    ),
    "cores without a process": (
        {"instance": "ml.trn2.48xlarge", "parallelism": {"processesPerNode": 16}},
        "parallelism.processesPerNode",
    ),
    **{
        f"weights that do not fit a core of {instance}": (
            {"instance": instance, "model": {"id": "meta-llama/Llama-3.3-70B-Instruct"}},
            "model.id",
        )
        for instance in ("trn1.32xlarge", "ml.trn2.48xlarge", "trn2.3xlarge")
    },
    "groups that Neuron cannot create": (
        {"instance": "trn2.48xlarge", "parallelism": {"tensorParallelSize": 8}},
        "parallelism.tensorParallelSize",
    ),
    "graphs of another generation": (
        {"instance": "trn2.48xlarge", "neuron": {"target": "trn1"}},
        "neuron.target",
    ),
    "logical cores of two on Trn1": (
        {"instance": "trn1.32xlarge", "neuron": {"logicalCoreSize": 2}},
        "neuron.logicalCoreSize",
    ),
    "a GPU": ({"instance": "ml.p5.48xlarge"}, "instance"),
    "Trainium3": ({"instance": "trn3.48xlarge"}, "instance"),
    "a size that HyperPod does not have": ({"instance": "ml.trn2u.48xlarge"}, "instance"),
    "several small nodes": ({"instance": "trn2.3xlarge", "parallelism": {"nodes": 2}}, "parallelism.nodes"),
    "auto-resume outside HyperPod": (
        {"instance": "trn1.32xlarge", "hyperpod": {"autoResume": True}},
        "hyperpod.autoResume",
    ),
    "compiling on CPUs with native": (merged(TRN2, {"compile": {"runsOn": "cpu"}}), "compile.runsOn"),
    "operator by operator with xla": (merged(NEURON, {"compile": {"mode": False}}), "compile.mode"),
    "fallbacks with xla": (merged(NEURON, {"compile": {"onFallback": "warn"}}), "compile.onFallback"),
    "the wrong device": (
        merged(NEURON, {"devices": {"aws.amazon.com/neuroncore": 2}}),
        "devices.aws.amazon.com/neuroncore",
    ),
    "a limit without a price": ({"guards": {"maxCost": 10}}, "guards.maxCost"),
    "a timeout of nothing": ({"guards": {"stallTimeout": "0m"}}, "guards.stallTimeout"),
    "one repository for two models": (
        {"publish": {"hub": {"adapter": "a/b", "merged": "a/b", "tokenSecret": "x"}}},
        "publish.hub.adapter",
    ),
    "a repository without a token": ({"publish": {"hub": {"merged": "a/b"}}}, "publish.hub.tokenSecret"),
    "a token instead of a Secret's name": ({"huggingFace": {"tokenSecret": "QwErTyUiOp"}}, "huggingFace.tokenSecret"),
    "a token instead of its key": ({"publish": {"hub": {"tokenKey": "QwErTy/UiOp="}}}, "publish.hub.tokenKey"),
    "a token for metrics": ({"monitoring": {"secretName": "QwErTy_UiOp", "wandb": True}}, "monitoring.secretName"),
    "a token without a repository": ({"publish": {"hub": {"tokenSecret": "x"}}}, "publish.hub.tokenSecret"),
    "a report that is not made": (
        {"publish": {"s3": {"uri": "s3://bucket/a", "artifacts": ["report"]}}, "evaluation": {"enabled": False}},
        "publish.s3.artifacts",
    ),
    "MLflow without a server": ({"monitoring": {"mlflow": True}}, "monitoring.mlflow"),
    "credentials that nothing reads": ({"monitoring": {"secretName": "x"}}, "monitoring.secretName"),
    "a priority without a queue": ({"kueue": {"priorityClass": "high"}}, "kueue.priorityClass"),
    "the launcher's time": (
        {"stages": {"train": {"extraEnv": {"LLAMA_LORA_GRACE_SECONDS": 300}}}},
        f"{ENVIRONMENT}.LLAMA_LORA_GRACE_SECONDS",
    ),
    "an object of no kind": ({"extraObjects": {"a": {"apiVersion": "v1"}}}, "extraObjects.a"),
    "a Secret": ({"extraObjects": {"b": {"apiVersion": "v1", "kind": "Secret"}}}, "extraObjects.b"),
    "a list of objects": ({"extraObjects": {"c": {"apiVersion": "v1", "kind": "List"}}}, "extraObjects.c"),
    "an object twice": (
        {
            "extraObjects": {
                "d": {"apiVersion": "apps/v1", "kind": "Deployment"},
                "e": {"apiVersion": "apps/v1beta1", "kind": "Deployment", "metadata": {"name": "d"}},
            }
        },
        "extraObjects.e",
    ),
    "a label of a Job's pods": (
        {"stages": {"merge": {"podLabels": {"job-name": "x"}}}},
        "stages.merge.podLabels.job-name",
    ),
    "a label of all Jobs' pods": ({"commonLabels": {"controller-uid": "x"}}, "commonLabels.controller-uid"),
    "more than the limit": (
        {"stages": {"merge": {"resources": {"requests": {"cpu": 2}, "limits": {"cpu": "1500m"}}}}},
        "stages.merge.resources.requests.cpu",
    ),
    "more than the default limit": (
        {"stages": {"gate": {"resources": {"requests": {"memory": "2Gi"}}}}},
        "stages.gate.resources.requests.memory",
    ),
    "more than a limit of 0": (
        {"stages": {"publish": {"resources": {"limits": {"cpu": 0}}}}},
        "stages.publish.resources.requests.cpu",
    ),
    "huge pages without a limit": (
        {"stages": {"merge": {"resources": {"requests": {"hugepages-1Gi": "1Gi"}}}}},
        "stages.merge.resources.requests.hugepages-1Gi",
    ),
    "parts of huge pages": (
        {"stages": {"evaluate": {"resources": {"limits": {"hugepages-2Mi": "5Mi"}}}}},
        "stages.evaluate.resources.limits.hugepages-2Mi",
    ),
    "an administrator": (
        {"stages": {"merge": {"capabilities": {"CAP_SYS_ADMIN": True}}}},
        "stages.merge.capabilities.CAP_SYS_ADMIN",
    ),
    "a capability with its prefix": (
        {"stages": {"train": {"capabilities": {"CAP_IPC_LOCK": True}}}},
        "stages.train.capabilities.CAP_IPC_LOCK",
    ),
    "no volume": ({"storage": {"enabled": False}}, "storage.enabled"),
    "no size of FSx": ({"storage": {"kind": "fsx", "size": "1300Gi", "storageClass": "fsx-sc"}}, "storage.size"),
    "FSx without a class": ({"storage": {"kind": "fsx", "size": "1200Gi", "storageClass": ""}}, "storage.storageClass"),
    "a file system without its name": (
        {"storage": {"kind": "fsx-static", "static": {"fileSystemId": "fs-0123456789abcdef0", "mountName": "fsx"}}},
        "storage.static.dnsName",
    ),
    "a class without a subnet": (
        {
            "storage": {
                "kind": "fsx",
                "size": "1200Gi",
                "fsx": {"createStorageClass": True, "securityGroupIds": ["sg-0123456789abcdef0"]},
            }
        },
        "storage.fsx.subnetId",
    ),
    **{
        f"FSx: {key}": ({"storage": {"fsx": {**CLASS, **fsx}}}, f"storage.fsx.{key}")
        for key, fsx in {
            "perUnitStorageThroughput": {"deploymentType": "PERSISTENT_1", "perUnitStorageThroughput": 1000},
            "fileSystemTypeVersion": {"fileSystemTypeVersion": "2.10"},
            "kmsKeyId": {"deploymentType": "SCRATCH_2", "kmsKeyId": "a"},
            "s3ImportPath": {"s3ImportPath": "s3://bucket/a"},
            "s3ExportPath": {"deploymentType": "PERSISTENT_1", "s3ImportPath": "s3://one", "s3ExportPath": "s3://two"},
            "autoImportPolicy": {"deploymentType": "SCRATCH_2", "autoImportPolicy": "NEW"},
        }.items()
    },
    "a size of SCRATCH_1": (
        {"storage": {"size": "4800Gi", "fsx": {**CLASS, "deploymentType": "SCRATCH_1"}}},
        "storage.size",
    ),
    "nodes that cannot share a volume": (
        {"parallelism": {"nodes": 2, "dataParallelSize": 4}, "storage": {"accessModes": ["ReadWriteOnce"]}},
        "storage.accessModes",
    ),
    "a secret": ({"stages": {"train": {"extraEnv": {"API_KEY": "x"}}}}, f"{ENVIRONMENT}.API_KEY"),
    "the chart's own variable": (
        {"stages": {"train": {"extraEnv": {"LLAMA_LORA_WORKSPACE": "/x"}}}},
        f"{ENVIRONMENT}.LLAMA_LORA_WORKSPACE",
    ),
    "the image's variable": (
        {"stages": {"train": {"extraEnv": {"LLAMA_LORA_IMAGE": "x"}}}},
        f"{ENVIRONMENT}.LLAMA_LORA_IMAGE",
    ),
    "another compile cache": (
        merged(NEURON, {"stages": {"train": {"extraEnv": {"NEURON_COMPILE_CACHE_URL": "/x"}}}}),
        f"{ENVIRONMENT}.NEURON_COMPILE_CACHE_URL",
    ),
    "another cache of native": (
        merged(TRN2, {"stages": {"train": {"extraEnv": {"TORCH_NEURONX_NEFF_CACHE_DIR": "/x"}}}}),
        f"{ENVIRONMENT}.TORCH_NEURONX_NEFF_CACHE_DIR",
    ),
    "cores of the pod": (
        merged(TRN2, {"stages": {"train": {"extraEnv": {"NEURON_RT_VISIBLE_CORES": "0-15"}}}}),
        f"{ENVIRONMENT}.NEURON_RT_VISIBLE_CORES",
    ),
    "flags of one stage": (
        merged(NEURON, {"stages": {"train": {"extraEnv": {"NEURON_CC_FLAGS": "-O1"}}}}),
        f"{ENVIRONMENT}.NEURON_CC_FLAGS",
    ),
}


REFUSED_TOGETHER = together(values for values, _ in REFUSED.values())


@pytest.mark.parametrize(("values", "key"), REFUSED.values(), ids=REFUSED)
def test_genvalues_and_the_chart_refuse_the_same_values_by_the_same_key(values: Values, key: str) -> None:
    wrong = merged(MINIMAL, values)
    keys = {".".join(each) for problem in contradictions(on_top_of_defaults(CHART, wrong)) for each in problem.keys}
    assert key in keys
    for part in re.split(r"\.(?:extraEnv\.|(?=resources\.))", key):
        assert refused_with(part, values, REFUSED_TOGETHER)


SPLITS = ["", ":", ":10%", "0:", ":-0", ":0%", "-5:", "5:5", "5:-5", "-5:5", "-5:-6", "-6:-5", "100%:", ":-100%"]
SPLITS += [
    "90%:-20%",
    "-20%:90%",
    "10%:-90%",
    "5:9",
    "999999999999999:",
    "08:9",
    "-1:0",
    "1:1%",
    "-0:1",
    "010:9",
]


def test_both_refuse_the_same_parts_without_rows() -> None:
    sources = {f"n{number}": {"source": "a/b", "split": f"x[{part}]"} for number, part in enumerate(SPLITS) if part}
    wrong = merged(MINIMAL, {"dataset": {"additional": sources}})
    found = {problem.keys[0][2] for problem in contradictions(on_top_of_defaults(CHART, wrong))}
    with pytest.raises(Refused) as refused:
        render(wrong)
    assert found == set(re.findall(r"additional\.(n\d+)\.split .* has a part without rows", str(refused.value)))
    assert len(found) > 5


# Helm's toYaml returns "" for a value with one of these, which emptied the run config, or (U+0085) makes it a space.
WITH_CHARACTERS: Values = {
    "dataset": {"columns": {"text": "a\x7f"}},
    "serviceAccount": {"annotations": {"a": "\x80b"}},
    "stageDefaults": {"podAnnotations": {"a": "\ufffe"}, "extraEnv": {"A": "\x85"}},
    "stages": {"train": {"extraVolumes": {"v": {"csi": {"a\x9f": "b"}}}}},
    "extraObjects": {"o": {"apiVersion": "v1", "kind": "Pod", "spec": {"args": ["a\uffff"]}}},
}
CHARACTERS = {
    "dataset.columns.text": "U+007F",
    "serviceAccount.annotations.a": "U+0080",
    "stageDefaults.podAnnotations.a": "U+FFFE",
    "stageDefaults.extraEnv.A": "U+0085",
    "stages.train.extraVolumes.v.csi": "U+009F",
    "extraObjects.o.spec.args": "U+FFFF",
}


def test_both_refuse_characters_that_helm_cannot_render(helm: int) -> None:
    wrong = merged(MINIMAL, WITH_CHARACTERS)
    problems = list(contradictions(on_top_of_defaults(CHART, wrong)))
    found = {
        ".".join(part for part in each.keys[0] if part != 0): each.what.split()[3].rstrip(",") for each in problems
    }
    assert found == CHARACTERS
    with pytest.raises(Refused) as refused:
        render(wrong, helm=helm)
    told = re.findall(rf"(\S+) contains the character (U\S+){re.escape(UNRENDERED)}", str(refused.value))
    assert dict(told) == CHARACTERS


def test_every_other_character_reaches_the_run_config_as_it_was_written(helm: int) -> None:
    text = " \t\n\r\x01~\xa0\u2028a\u2029\ufeff\ufffd"
    values = merged(MINIMAL, {"dataset": {"columns": {"text": text}}})
    assert list(contradictions(on_top_of_defaults(CHART, values))) == []
    assert config(render(values, helm=helm), "run.yaml")["dataset"]["columns"]["text"] == text


def test_neither_refuses_values_that_are_right() -> None:
    assert list(contradictions(on_top_of_defaults(CHART, MINIMAL))) == []
    assert render(MINIMAL)


@pytest.mark.parametrize("value", [True, 0, "1", "off"])
def test_a_switch_about_a_token_is_no_secret(value: object) -> None:
    values = merged(MINIMAL, {"stageDefaults": {"extraEnv": {"HF_HUB_DISABLE_IMPLICIT_TOKEN": value}}})
    assert list(contradictions(on_top_of_defaults(CHART, values))) == []
    assert render(values)


@pytest.mark.parametrize(
    "dataset",
    [
        {"evalFraction": 0, "eval": {"split": "test"}},
        {"evalFraction": 0, "eval": {"source": "org/other", "config": "en", "revision": "refs/convert/parquet"}},
        {"split": "train[:90%]", "eval": {"split": "train[90%:]"}},
        {"eval": {"source": "org/other", "split": "train"}},
        {"config": "en", "eval": {"config": "de", "split": "train"}},
        {"groupColumn": "user"},
        {"overlong": "split", "format": "text", "additional": {"books": {"source": "a/b"}}},
        {"trainOn": "last-answer", "format": "text", "additional": {"x": {"source": "a/b", "format": "chat"}}},
        {"additional": {"replay": {"source": "/workspace/replay/", "weight": "0.5", "split": "train[:10%] + test"}}},
        {"onBadRow": "skip", "maxDropped": 1, "overlong": "drop", "columns": {"system": "s", "history": "h"}},
    ],
)
def test_datasets_that_both_accept(dataset: Values, helm: int) -> None:
    values = merged(MINIMAL, {"dataset": dataset})
    assert list(contradictions(on_top_of_defaults(CHART, values))) == []
    assert RunConfig.model_validate(config(render(values, helm=helm), "run.yaml")).dataset.holds_out


def test_measuring_the_held_out_loss_while_training_is_accepted(helm: int) -> None:
    wanted = {"evalSteps": 1_000_000, "evalRows": 9, "loadBestModelAtEnd": True, "earlyStoppingPatience": 2}
    wanted["earlyStoppingThreshold"] = "0.05"
    values = merged(MINIMAL, {"training": wanted, "dataset": {"evalFraction": 0, "eval": {"split": "test"}}})
    assert list(contradictions(on_top_of_defaults(CHART, values))) == []
    training = RunConfig.model_validate(config(render(values, helm=helm), "run.yaml")).training
    assert (training.eval_steps, training.early_stopping_threshold) == (1_000_000, 0.05)
    assert training.load_best_model_at_end and training.early_stopping_patience == 2


def test_a_section_or_key_set_to_null_has_its_defaults(helm: int) -> None:
    taken_away: Values = {"training": None, "rbac": None, "pipeline": {"mode": None}, "lora": {"r": None}}
    assert render(merged(MINIMAL, taken_away), helm=helm) == render(MINIMAL, helm=helm)


def test_a_limit_of_a_container_set_to_null_is_no_limit(helm: int) -> None:
    assert render(merged(MINIMAL, {"stageDefaults": {"resources": {"limits": {"cpu": None}}}}), helm=helm)


def test_numbers_that_helm_set_passes_as_text_are_numbers(helm: int) -> None:
    as_text: Values = {
        "training": {"learningRate": "3e-5", "warmupRatio": "0.04"},
        "guards": {"maxCost": "99.5", "pricePerNodeHour": "2.5"},
    }
    objects = render(merged(MINIMAL, as_text), helm=helm)
    training = config(objects, "run.yaml")["training"]
    assert (training["learningRate"], training["warmupRatio"]) == (3e-5, 0.04)
    assert config(objects, "cluster.yaml")["guards"]["maxCost"] == 99.5
    with pytest.raises(Refused, match=r"lora.dropout 1.5 is too large. Set it to less than 1"):
        render(merged(MINIMAL, {"lora": {"dropout": "1.5"}}), helm=helm)
    with pytest.raises(Refused, match=r"training.epochs 0.0 is too small. Set it to more than 0"):
        render(merged(MINIMAL, {"training": {"epochs": "0.0"}}), helm=helm)
    with pytest.raises(Refused, match=r"dataset.additional.my.x.weight -1 is too small. Set it to more than 0"):
        additional = {"my.x": {"source": "a/b", "weight": "-1"}, "y": {"source": "a/b", "weight": "0.5"}}
        render(merged(MINIMAL, {"dataset": {"additional": additional}}), helm=helm)
