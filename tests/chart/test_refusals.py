"""Invalid values are rejected before anything is installed, with the key and a fix, by Helm 3 and 4."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml

from chart.manifests import CHART, MINIMAL, Values, merged, pods, refusal, refused_with, render, together

SCHEMA = jsonschema.Draft7Validator(json.loads((CHART / "values.schema.json").read_text()))
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())

NODES = "requiredDuringSchedulingIgnoredDuringExecution"
PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"

# Rejected by the schema: values, and the key that the message must name.
MISFITS: dict[str, tuple[Values, str]] = {
    "unknown section": ({"trainning": {}}, "trainning"),
    "unknown key": ({"lora": {"rank": 8}}, "rank"),
    "unknown stage": ({"stages": {"distill": {}}}, "distill"),
    "unknown key of a stage": ({"stages": {"train": {"replicas": 2}}}, "replicas"),
    "text for a number": ({"training": {"learningRate": "5e-5 or so"}}, "learningRate"),
    "number for text": ({"model": {"revision": 20241001}}, "revision"),
    "text for a boolean": ({"training": {"packing": "False"}}, "packing"),
    "fraction of a step": ({"training": {"saveSteps": 1.5}}, "saveSteps"),
    "learning rate 0": ({"training": {"learningRate": 0}}, "learningRate"),
    "maxSteps 0": ({"training": {"maxSteps": 0}}, "maxSteps"),
    "no LoRA rank": ({"lora": {"r": 0}}, "lora.r"),
    "dropout 1": ({"lora": {"dropout": 1}}, "dropout"),
    "unknown module": ({"lora": {"targetModules": ["attention"]}}, "targetModules"),
    "no modules": ({"lora": {"targetModules": []}}, "targetModules"),
    "all rows held out": ({"dataset": {"evalFraction": 1}}, "evalFraction"),
    "unknown format": ({"dataset": {"format": "alpaca"}}, "format"),
    "half a split": ({"dataset": {"split": "train[:10%"}}, "split"),
    "a source without a name": ({"dataset": {"additional": {"x": {"source": ""}}}}, "additional.x.source"),
    "a weight of nothing": ({"dataset": {"additional": {"x": {"source": "a/b", "weight": 0}}}}, "weight"),
    "a source named like a path": ({"dataset": {"additional": {"../x": {"source": "a/b"}}}}, "dataset.additional"),
    "a source named in two lines": ({"dataset": {"additional": {"x\ny": {"source": "a/b"}}}}, "dataset.additional"),
    "unknown policy": ({"dataset": {"onBadRow": "ignore"}}, "onBadRow"),
    "unknown column": ({"dataset": {"columns": {"question": "q"}}}, "question"),
    "unknown backend": ({"backend": "cuda"}, "backend"),
    "unknown mode": ({"pipeline": {"mode": "background"}}, "mode"),
    "invalid instance type": ({"instance": "trn1"}, "instance"),
    "tag in the repository": ({"image": {"repository": "llama-lora:v1"}}, "repository"),
    "tag in the repository after one part": ({"image": {"repository": "x:1"}}, "repository"),
    "digest in the repository": ({"image": {"repository": f"x/y@sha256:{'0' * 64}"}}, "repository"),
    "invalid label key": ({"stageDefaults": {"podLabels": {"cost center": "1"}}}, "podLabels"),
    "invalid label value": ({"stages": {"train": {"podLabels": {"owner": "a b"}}}}, "podLabels.owner"),
    "a label value that is too long": ({"commonLabels": {"owner": "x" * 64}}, "commonLabels.owner"),
    "invalid value of a job's label": ({"stages": {"train": {"jobLabels": {"owner": "me!"}}}}, "jobLabels.owner"),
    "invalid node label": ({"stages": {"merge": {"nodeSelector": {"pool": "a/b"}}}}, "nodeSelector.pool"),
    "invalid key of an annotation": ({"serviceAccount": {"annotations": {"role arn": "x"}}}, "annotations"),
    "invalid volume name": ({"stages": {"merge": {"extraVolumes": {"My_Data": {"emptyDir": {}}}}}}, "extraVolumes"),
    "a mount over everything": ({"stages": {"merge": {"extraVolumeMounts": {"a": {"mountPath": "/"}}}}}, "mountPath"),
    "a mount over everything, twice": (
        {"stages": {"merge": {"extraVolumeMounts": {"a": {"mountPath": "//"}}}}},
        "mountPath",
    ),
    "a mount with a colon": ({"stages": {"merge": {"extraVolumeMounts": {"a": {"mountPath": "/a:b"}}}}}, "mountPath"),
    "a workspace over everything": ({"workspace": {"mountPath": "/"}}, "mountPath"),
    "misspelled toleration": ({"stageDefaults": {"tolerations": [{"key": "a", "effekt": "NoSchedule"}]}}, "effekt"),
    "unknown effect": (
        {"stageDefaults": {"tolerations": [{"key": "a", "effect": "NoScheduled"}]}},
        "tolerations.0.effect",
    ),
    "unknown operator": (
        {"stageDefaults": {"tolerations": [{"key": "a", "operator": "In"}]}},
        "tolerations.0.operator",
    ),
    "misspelled affinity": ({"stageDefaults": {"affinity": {"nodeAffinitty": {}}}}, "nodeAffinitty"),
    "misspelled part of an affinity": (
        {"stages": {"merge": {"affinity": {"podAntiAffinity": {"requiredDuringScheduling": []}}}}},
        "requiredDuringScheduling",
    ),
    "node affinity without terms": (
        {"stages": {"merge": {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {}}}}}},
        "requiredDuringSchedulingIgnoredDuringExecution",
    ),
    "a spread without a topology": (
        {"stages": {"train": {"topologySpreadConstraints": [{"maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule"}]}}},
        "topologySpreadConstraints",
    ),
    "a secret in place of its name": (
        {"stages": {"train": {"extraEnvSecrets": {"WANDB_API_KEY": {"name": "a", "key": "b", "value": "c"}}}}},
        "extraEnvSecrets.WANDB_API_KEY",
    ),
    "variables that are written down": (
        {"stages": {"train": {"extraEnvFrom": {"a": {"data": {"PASSWORD": "x"}}}}}},
        "extraEnvFrom.a",
    ),
    "no seccomp": ({"stages": {"train": {"seccompProfile": {"type": "Unconfined"}}}}, "seccompProfile.type"),
    "the group of root": ({"stages": {"train": {"supplementalGroups": [0]}}}, "supplementalGroups"),
    "a capability by another name": ({"stages": {"train": {"capabilities": {"ipc-lock": True}}}}, "capabilities"),
    "unknown provisioner": ({"capacityReservation": {"provisioner": "slurm"}}, "provisioner"),
    "invalid reservation": ({"capacityReservation": {"id": "fs-0123456789"}}, "capacityReservation.id"),
    "a port above all": ({"networkPolicy": {"apiServerPorts": [70000]}}, "apiServerPorts"),
    "short digest": ({"image": {"digest": "sha256:abc"}}, "digest"),
    "a kind that is no text": ({"extraObjects": {"a": {"apiVersion": "v1", "kind": 2}}}, "extraObjects.a.kind"),
    "metadata that is text": ({"extraObjects": {"b": {"metadata": "x"}}}, "extraObjects.b.metadata"),
    "labels that are text": ({"extraObjects": {"c": {"metadata": {"labels": "x"}}}}, "extraObjects.c.metadata.labels"),
    "a label that is no text": (
        {"extraObjects": {"d": {"metadata": {"labels": {"a": 1}}}}},
        "extraObjects.d.metadata.labels.a",
    ),
    "a port that is no number": ({"monitoring": {"pushgateway": "http://h:abc"}}, "monitoring.pushgateway"),
    "a port above all others": ({"monitoring": {"otlpEndpoint": "http://h:65536/v1"}}, "monitoring.otlpEndpoint"),
    "two points in the repository": ({"image": {"repository": "a/b..c"}}, "image.repository"),
    "a taint of any value with a value": (
        {"stageDefaults": {"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]}},
        "tolerations.0",
    ),
    "a taint without a key": (
        {"stages": {"merge": {"tolerations": [{"operator": "Equal", "value": "b"}]}}},
        "stages.merge.tolerations.0",
    ),
    "an empty toleration": ({"stages": {"neff": {"tolerations": [{}]}}}, "stages.neff.tolerations.0"),
    "seconds of a taint that evicts nothing": (
        {"stages": {"train": {"tolerations": [{"key": "a", "effect": "NoSchedule", "tolerationSeconds": 5}]}}},
        "stages.train.tolerations.0",
    ),
    "an absolute subPath": (
        {"stages": {"merge": {"extraVolumeMounts": {"b": {"mountPath": "/b", "subPath": "/x"}}}}},
        "extraVolumeMounts.b.subPath",
    ),
    "a subPath that leads out": (
        {"stages": {"merge": {"extraVolumeMounts": {"c": {"mountPath": "/c", "subPath": "x/../.."}}}}},
        "extraVolumeMounts.c.subPath",
    ),
    "an absolute path of a profile": (
        {"stages": {"merge": {"seccompProfile": {"type": "Localhost", "localhostProfile": "/x.json"}}}},
        "seccompProfile.localhostProfile",
    ),
    "no terms of nodes": (
        {"stages": {"gate": {"affinity": {"nodeAffinity": {NODES: {"nodeSelectorTerms": []}}}}}},
        "stages.gate.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms",
    ),
    "a preference without a weight": (
        {"stages": {"gate": {"affinity": {"nodeAffinity": {PREFERRED: [{"preference": {}}]}}}}},
        "nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution.0",
    ),
    "a preference of pods without a term": (
        {"stages": {"gate": {"affinity": {"podAffinity": {PREFERRED: [{"weight": 1}]}}}}},
        "podAffinity.preferredDuringSchedulingIgnoredDuringExecution.0",
    ),
    "one pod beside many nodes": (
        {"storage": {"accessModes": ["ReadWriteMany", "ReadWriteOncePod"]}},
        "storage.accessModes",
    ),
    "no shared memory": ({"sharedMemory": "0Gi"}, "sharedMemory"),
    "more than all of a split": ({"dataset": {"split": "train[:200%]"}}, "dataset.split"),
    "relative model path": ({"model": {"id": "", "path": "models/llama"}}, "path"),
    "no processes": ({"parallelism": {"processesPerNode": 0}}, "processesPerNode"),
    "device without a domain": ({"devices": {"neuron": 1}}, "neuron"),
    "half a device": ({"devices": {"aws.amazon.com/neuron": 0.5}}, "devices"),
    "devices of a stage that does not train": (
        {"stages": {"merge": {"resources": {"limits": {"aws.amazon.com/neuron": 16}}}}},
        "aws.amazon.com/neuron",
    ),
    "invalid quantity": ({"stageDefaults": {"resources": {"limits": {"memory": "lots"}}}}, "memory"),
    "a folder on the node": (
        {"stages": {"train": {"extraVolumes": {"dev": {"hostPath": {"path": "/dev"}}}}}},
        "hostPath",
    ),
    "root": ({"securityContext": {"runAsUser": 0}}, "runAsUser"),
    "a cleanup timeout shorter than the grace period": ({"cleanup": {"timeoutSeconds": 110}}, "timeoutSeconds"),
    "dots in the compile cache's path": ({"workspace": {"mountPath": "/mnt/v1.0"}}, "mountPath"),
    "unknown kind of storage": ({"storage": {"kind": "efs"}}, "kind"),
    "unknown key of storage": ({"storage": {"claim": "x"}}, "claim"),
    "unknown key of FSx": ({"storage": {"fsx": {"throughput": 1}}}, "throughput"),
    "on, which YAML reads as true": ({"compile": {"true": "cpu"}}, "compile"),
    "unknown attention": ({"training": {"attention": "flash_attention_2"}}, "attention"),
    "a cost limit of 0": ({"guards": {"maxCost": 0}}, "maxCost"),
    "a duration without a unit": ({"guards": {"stallTimeout": 1800}}, "stallTimeout"),
    "an invalid duration": ({"guards": {"stallTimeout": "half an hour"}}, "stallTimeout"),
    "a duration with minutes before hours": ({"guards": {"stallTimeout": "30m1h"}}, "stallTimeout"),
    "a price with a currency": ({"guards": {"pricePerNodeHour": "$21.50"}}, "pricePerNodeHour"),
    "invalid size": ({"storage": {"size": "big"}}, "size"),
    "no access mode": ({"storage": {"accessModes": []}}, "accessModes"),
    "full name too long for worker pods": ({"fullnameOverride": "x" * 39}, "fullnameOverride"),
    "full name that is not valid for a Service": ({"fullnameOverride": "1st"}, "fullnameOverride"),
    "run name outside its folder": ({"name": "../other"}, "name"),
}

# Rejected by the templates: values, and a part of the message.
NEURON: Values = {"instance": "trn1.32xlarge", "backend": "neuron", "devices": {"aws.amazon.com/neuron": 16}}
TRN2: Values = {
    "instance": "trn2.48xlarge",
    "devices": {"aws.amazon.com/neuron": 16},
    "neuron": {"target": "trn2", "logicalCoreSize": 2},
}
CLASS: Values = {"createStorageClass": True, "subnetId": "subnet-01234567", "securityGroupIds": ["sg-01234567"]}
CONTRADICTIONS: dict[str, tuple[Values, str]] = {
    "a number that changes": (
        {"stages": {"merge": {"extraEnv": {"A": 9007199254740993}}}},
        "stages.merge: extraEnv.A is a number of which Helm does not keep every digit. Put it in quotes",
    ),
    "a large number": (
        {"stages": {"train": {"extraEnv": {"A": -12345678901234567890}}}},
        "stages.train: extraEnv.A is a number of which Helm does not keep every digit. Put it in quotes",
    ),
    "no model": ({"model": {"id": ""}}, "model.id is required. Set it, e.g. --set model.id="),
    "two models": ({"model": {"path": "/a"}}, "model.id and model.path are both set. Keep one"),
    "revision of a path": (
        {"model": {"id": "", "path": "/a", "revision": "main"}},
        "model.revision cannot be combined with model.path. Remove model.revision.",
    ),
    "no dataset": ({"dataset": {"source": ""}}, "dataset.source is required. Set it, e.g. --set dataset.source="),
    "no format": ({"dataset": {"format": ""}}, "dataset.format is required. Set it to text, instruction,"),
    "evaluation without held-out rows": (
        {"dataset": {"evalFraction": 0}},
        "evaluation.enabled is true, but dataset.evalFraction 0 leaves no rows to evaluate on. Raise",
    ),
    "half of dataset.eval": (
        {"dataset": {"eval": {"config": "en"}}},
        "dataset.eval.config has no effect without dataset.eval.source or dataset.eval.split. Set dataset.eval.split",
    ),
    "held-out rows that are trained on": (
        {"dataset": {"eval": {"split": "train"}}},
        "dataset.eval.split: the held-out rows are those that are trained on. Set it to another split",
    ),
    "groups beside dataset.eval": (
        {"dataset": {"eval": {"split": "test"}, "groupColumn": "user"}},
        "dataset.groupColumn has no effect, because dataset.eval says which rows are held out. Remove one",
    ),
    "groups without held-out rows": (
        {"dataset": {"evalFraction": 0, "groupColumn": "user"}, "evaluation": {"enabled": False}},
        "dataset.groupColumn has no effect, because dataset.evalFraction 0 holds out no rows. Raise",
    ),
    "pieces of conversations": (
        {"dataset": {"format": "chat", "overlong": "split"}},
        "dataset.overlong split applies to format text only. Set it to truncate or drop.",
    ),
    "answers of text": (
        {"dataset": {"format": "text", "trainOn": "last-answer"}},
        "dataset.trainOn last-answer: format text has no answers. Remove dataset.trainOn.",
    ),
    "a part without rows": (
        {"dataset": {"eval": {"split": "train[90%:10%]"}}},
        "dataset.eval.split train[90%:10%] has a part without rows. Set the first row before the end, such as",
    ),
    "a relative folder": (
        {"dataset": {"additional": {"more": {"source": "data/"}}}},
        "dataset.additional.more.source data/ is a relative path, which pods cannot read. Copy the file",
    ),
    "a relative glob": (
        {"dataset": {"eval": {"source": "data/*.jsonl"}}},
        "dataset.eval.source data/*.jsonl is a relative path, which pods cannot read. Copy the file",
    ),
    "a relative compressed file": (
        {"dataset": {"source": "ROWS.CSV.GZ"}},
        "dataset.source ROWS.CSV.GZ is a relative path, which pods cannot read. Copy the file",
    ),
    "processes that do not match the layout": (
        {"parallelism": {"nodes": 2, "processesPerNode": 4, "tensorParallelSize": 1, "dataParallelSize": 4}},
        "parallelism.nodes * parallelism.processesPerNode = 8 processes, but parallelism.tensorParallelSize * "
        "parallelism.dataParallelSize = 4. Set parallelism.dataParallelSize to 8.",
    ),
    "tensor parallelism that does not divide the processes": (
        merged(NEURON, {"parallelism": {"processesPerNode": 32, "tensorParallelSize": 5, "dataParallelSize": 6}}),
        "parallelism.dataParallelSize = 30. Make parallelism.tensorParallelSize a divisor of 32.",
    ),
    "shards of xla": (
        merged(NEURON, {"parallelism": {"shardSize": 2}}),
        "parallelism.shardSize is 2, which requires backend native. Set it to 1.",
    ),
    "shards that do not divide the copies": (
        {"parallelism": {"shardSize": 4}},
        "parallelism.shardSize 4 does not divide parallelism.dataParallelSize 2. Set it to a divisor.",
    ),
    "xla on CPUs": (
        merged(NEURON, {"instance": "cpu"}),
        "instance is cpu, but backend is xla. Set instance to the nodes' type",
    ),
    "Trainium3": (
        {"instance": "ml.trn3.48xlarge"},
        "instance ml.trn3.48xlarge is not supported: Trainium 1 and 2 are supported, Trainium 3 when AWS",
    ),
    "a GPU": (
        {"instance": "p5.48xlarge", "backend": "neuron"},
        "instance p5.48xlarge is not supported: Trainium 1 and 2 are supported, Trainium 3 when AWS",
    ),
    "a size that HyperPod does not have": (
        {"instance": "ml.trn1.2xlarge"},
        "instance ml.trn1.2xlarge is not an instance type of SageMaker HyperPod. Use ml.trn1.32xlarge, ml.trn1n.32xl",
    ),
    "a size of no instance type": (
        {"instance": "trn2.32xlarge"},
        "instance trn2.32xlarge is not an instance type of AWS. Use trn1.2xlarge, trn1.32xlarge, trn1n.32xlarge, trn2",
    ),
    "several small nodes": (
        {"instance": "ml.trn2.3xlarge", "parallelism": {"nodes": 2}},
        "parallelism.nodes is 2, but instance ml.trn2.3xlarge supports one node only. Set it to 1, or instance to "
        "ml.trn1.32xlarge, ml.trn1n.32xlarge, ml.trn2.48xlarge.",
    ),
    "auto-resume outside HyperPod": (
        {"instance": "trn1.32xlarge", "hyperpod": {"autoResume": True}},
        "hyperpod.autoResume requires an instance type of HyperPod, and instance is trn1.32xlarge. Set "
        "hyperpod.autoResume to false, or instance to ml.trn1.32xlarge.",
    ),
    "auto-resume on any node": (
        {"hyperpod": {"autoResume": True}},
        "instance is cpu. Set hyperpod.autoResume to false, or instance to the type of the HyperPod nodes, with ml.",
    ),
    "devices that the node does not have": (
        {"instance": "trn1.32xlarge", "devices": {"aws.amazon.com/neuron": 99}},
        "devices.aws.amazon.com/neuron is 99, but instance trn1.32xlarge has 16. Set it to 16, or devices to null.",
    ),
    "cores without a process": (
        {"instance": "trn2.48xlarge", "parallelism": {"processesPerNode": 2}},
        "parallelism.processesPerNode is 2, but the devices of instance trn2.48xlarge have 64 logical cores, one "
        "process each. Set it to 64, or to null.",
    ),
    "more processes than the requested devices have cores": (
        {
            "instance": "trn1.32xlarge",
            "parallelism": {"processesPerNode": 32},
            "devices": {"aws.amazon.com/neuron": 1},
        },
        "parallelism.processesPerNode is 32, but the devices of instance trn1.32xlarge have 2 logical cores",
    ),
    "weights that do not fit a core": (
        {"instance": "trn2.48xlarge", "model": {"id": "meta-llama/Llama-3.3-70B-Instruct"}},
        "model.id meta-llama/Llama-3.3-70B-Instruct has 32.9 GiB of weights per core with "
        "parallelism.tensorParallelSize 4 and shardSize 1, and a core of trn2.48xlarge has 21 GiB for them. Set "
        "parallelism.shardSize to 4.",
    ),
    "weights that do not fit a core of Trn1": (
        {"instance": "trn1.32xlarge", "model": {"id": "meta-llama/Llama-3.3-70B-Instruct"}},
        "a core of trn1.32xlarge has 14 GiB for them. Set parallelism.tensorParallelSize to 16.",
    ),
    "a model that is too large": (
        {"instance": "trn2.3xlarge", "model": {"id": "meta-llama/Llama-3.3-70B-Instruct"}},
        "has 21 GiB for them. Use a larger instance type or a smaller model.",
    ),
    "groups that Neuron cannot create": (
        {"instance": "trn1.32xlarge", "parallelism": {"tensorParallelSize": 4}},
        "parallelism.tensorParallelSize is 4, but trn1.32xlarge supports process groups of 1, 2, 8, 16, 32. Set it",
    ),
    "operator by operator with xla": (
        merged(NEURON, {"compile": {"mode": "off"}}),
        "compile.mode off requires backend native. Set it to layers.",
    ),
    "fallbacks with xla": (
        merged(NEURON, {"compile": {"onFallback": "warn"}}),
        "compile.onFallback warn requires backend native. Set it to refuse.",
    ),
    "compiling on CPUs with native": (
        merged(TRN2, {"compile": {"runsOn": "cpu"}}),
        "compile.runsOn cpu requires backend xla. Set it to accelerator, or backend to xla.",
    ),
    "Trainium without devices": (
        merged(NEURON, {"devices": None}, {"devices": {"vpc.amazonaws.com/efa": 8}}),
        "devices has no aws.amazon.com/neuron, which instance trn1.32xlarge requires. Set devices to null",
    ),
    "a device resource that is not supported": (
        merged(NEURON, {"devices": {"aws.amazon.com/neurondevice": 16}}),
        "devices.aws.amazon.com/neurondevice is not supported, because it does not count whole devices. Use",
    ),
    "no volume": (
        {"storage": {"enabled": False}},
        "storage.enabled is false and storage.existingClaim is empty. Name the claim to use in storage.existingClaim",
    ),
    "an invalid FSx size": (
        {"storage": {"size": "3600Gi"}},
        "storage.size 3600Gi is not a valid size for FSx for Lustre. Use 1200Gi, 2400Gi or a multiple of 2400Gi.",
    ),
    "an FSx size in Ti": ({"storage": {"size": "3Ti"}}, "storage.size 3Ti is not a valid size for FSx for Lustre."),
    "an FSx size of SCRATCH_1": (
        {"storage": {"size": "4800Gi", "fsx": {**CLASS, "deploymentType": "SCRATCH_1"}}},
        "storage.size 4800Gi is not a valid size for FSx for Lustre. Use 1200Gi, 2400Gi or a multiple of 3600Gi.",
    ),
    "a throughput of another deployment type": (
        {"storage": {"fsx": {**CLASS, "deploymentType": "PERSISTENT_1", "perUnitStorageThroughput": 250}}},
        "storage.fsx.perUnitStorageThroughput 250 is not offered by deploymentType PERSISTENT_1. Set it to one of 50, "
        "100, 200, or to null.",
    ),
    "a throughput of SCRATCH": (
        {"storage": {"fsx": {**CLASS, "deploymentType": "SCRATCH_2", "perUnitStorageThroughput": 200}}},
        "storage.fsx.perUnitStorageThroughput 200 is not offered by deploymentType SCRATCH_2. Set it to null.",
    ),
    "an old Lustre": (
        {"storage": {"fsx": {**CLASS, "fileSystemTypeVersion": "2.10"}}},
        "storage.fsx.fileSystemTypeVersion 2.10 is not offered by deploymentType PERSISTENT_2. Set it to",
    ),
    "a key for SCRATCH": (
        {"storage": {"fsx": {**CLASS, "deploymentType": "SCRATCH_2", "kmsKeyId": "a"}}},
        "storage.fsx.kmsKeyId is not supported by deploymentType SCRATCH_2. Remove it, or set deploymentType",
    ),
    "a data repository of PERSISTENT_2": (
        {"storage": {"fsx": {**CLASS, "s3ImportPath": "s3://a-bucket/x"}}},
        "storage.fsx.s3ImportPath is not supported by deploymentType PERSISTENT_2, which requires a data repository",
    ),
    "an export without an import": (
        {"storage": {"fsx": {**CLASS, "deploymentType": "SCRATCH_2", "s3ExportPath": "s3://a-bucket/x"}}},
        "storage.fsx.s3ExportPath has no effect without storage.fsx.s3ImportPath. Set that, or remove it.",
    ),
    "an export to another bucket": (
        {
            "storage": {
                "fsx": {
                    **CLASS,
                    "deploymentType": "SCRATCH_2",
                    "s3ImportPath": "s3://one",
                    "s3ExportPath": "s3://two/x",
                }
            }
        },
        "storage.fsx.s3ExportPath is in another bucket than storage.fsx.s3ImportPath. Use the same bucket.",
    ),
    "FSx without a class": ({"storage": {"storageClass": ""}}, "storage.storageClass is required for storage.kind fsx"),
    "static without a file system": (
        {"storage": {"kind": "fsx-static", "static": {"dnsName": "a.b", "mountName": "fsx"}}},
        "storage.static.fileSystemId is required for storage.kind fsx-static.",
    ),
    "causal attention of xla with an unsupported sequence length": (
        merged(NEURON, {"training": {"attention": "causal", "maxSequenceLength": 3000}}),
        "training.maxSequenceLength 3000 is not a multiple of 2048, as training.attention causal requires with",
    ),
    "flash attention with a mask with an unsupported sequence length": (
        merged(NEURON, {"training": {"attention": "isolatedFlash", "maxSequenceLength": 3000}}),
        "training.maxSequenceLength 3000 is not a multiple of 2048, as training.attention isolatedFlash requires with",
    ),
    "flash attention with a mask with backend native": (
        {"training": {"attention": "isolatedFlash"}},
        "training.attention isolatedFlash requires backend xla. Set training.attention to isolated.",
    ),
    "native on Trainium with an unsupported sequence length": (
        merged(TRN2, {"training": {"maxSequenceLength": 1000}}),
        "training.maxSequenceLength 1000 is not a multiple of 512, as backend native requires on Trainium. Set it",
    ),
    "graphs for another instance": (
        merged(NEURON, {"instance": "ml.trn2.48xlarge", "neuron": {"target": "trn1"}}),
        "neuron.target is trn1, but instance is ml.trn2.48xlarge. Set neuron.target to trn2, and",
    ),
    "graphs of trn2 for trn1": (
        merged(NEURON, {"neuron": {"target": "trn2", "logicalCoreSize": 2}}),
        "neuron.target is trn2, but instance is trn1.32xlarge. Set neuron.target to trn1.",
    ),
    "logical cores of two on trn1": (
        merged(NEURON, {"neuron": {"logicalCoreSize": 2}}),
        "neuron.logicalCoreSize is 2, but neuron.target trn1 supports only 1. Set it to 1.",
    ),
    "nodes without EFA": (
        merged(NEURON, {"parallelism": {"nodes": 2}}),
        "devices has no vpc.amazonaws.com/efa, which 2 nodes (parallelism.nodes) require. Set it",
    ),
    "another cache of graphs": (
        merged(NEURON, {"stageDefaults": {"extraEnv": {"NEURON_COMPILE_CACHE_URL": "s3://bucket/cache"}}}),
        "stages.train: extraEnv.NEURON_COMPILE_CACHE_URL is set by the chart. Remove it: the cache is in",
    ),
    "another cache of native's graphs": (
        merged(TRN2, {"stageDefaults": {"extraEnv": {"TORCH_NEURONX_NEFF_CACHE_DIR": "/tmp/mine"}}}),
        "stages.train: extraEnv.TORCH_NEURONX_NEFF_CACHE_DIR is set by the chart. Remove it: the cache is in",
    ),
    "cores of the pod": (
        merged(TRN2, {"stageDefaults": {"extraEnv": {"NEURON_RT_VISIBLE_CORES": "0-15"}}}),
        "stages.train: extraEnv.NEURON_RT_VISIBLE_CORES is set by TorchNeuron in each worker, and not with",
    ),
    "another cache of graphs, by a flag": (
        merged(NEURON, {"stageDefaults": {"extraEnv": {"NEURON_CC_FLAGS": "-O1 --cache_dir=/workspace/mine"}}}),
        "stages.compile: extraEnv.NEURON_CC_FLAGS contains --cache_dir, which moves the compiler's cache. Remove",
    ),
    "other logical cores by the environment": (
        merged(NEURON, {"stageDefaults": {"extraEnv": {"NEURON_LOGICAL_NC_CONFIG": 1}}}),
        "stages.compile: extraEnv.NEURON_LOGICAL_NC_CONFIG is set by the chart. Use neuron.logicalCoreSize.",
    ),
    "bf16 by the environment": (
        merged(NEURON, {"stages": {"train": {"extraEnv": {"XLA_USE_BF16": 1}}}}),
        "stages.train: extraEnv.XLA_USE_BF16 is not supported since Neuron 2.25; before that it converts",
    ),
    "compiler flags of one stage alone": (
        merged(NEURON, {"stages": {"compile": {"extraEnv": {"NEURON_CC_FLAGS": "-O1"}}}}),
        "stages.compile and stages.train differ in extraEnv.NEURON_CC_FLAGS, so train needs other graphs than",
    ),
    "more shared memory than memory": (
        {"sharedMemory": "17Gi"},
        "sharedMemory 17Gi is more than stages.train: resources.limits.memory 16Gi, which includes it. Set it",
    ),
    "a cost limit without a price": (
        {"guards": {"maxCost": 200}},
        "guards.maxCost is 200, but guards.pricePerNodeHour is empty. Set it to the price in dollars of one cpu node",
    ),
    "a duration of zero": (
        {"guards": {"stallTimeout": "0h0m"}},
        "guards.stallTimeout 0h0m would stop every training at once. Set it to e.g. 30m, or leave it empty",
    ),
    "a storage class without a subnet": (
        {"storage": {"fsx": {"createStorageClass": True, "securityGroupIds": ["sg-01234567"]}}},
        "storage.fsx.subnetId is required for storage.fsx.createStorageClass.",
    ),
    "a storage class without security groups": (
        {"storage": {"fsx": {"createStorageClass": True, "subnetId": "subnet-01234567"}}},
        "storage.fsx.securityGroupIds is required for storage.fsx.createStorageClass.",
    ),
    "a ReadWriteOnce volume for two nodes": (
        {
            "parallelism": {"nodes": 2, "dataParallelSize": 4},
            "storage": {"kind": "generic", "accessModes": ["ReadWriteOnce"]},
        },
        "storage.accessModes lacks ReadWriteMany, which 2 nodes (parallelism.nodes) require. Add it",
    ),
    "existing RBAC without a prefix": (
        {"rbac": {"create": False}},
        "rbac.namePrefix is required when rbac.create is false. Set it to",
    ),
    "a token in the values": (
        {"stages": {"tokenize": {"extraEnv": {"HF_TOKEN": "hf_x"}}}},
        "stages.tokenize.extraEnv.HF_TOKEN looks like a secret. Values can be read by",
    ),
    "a key for all stages": (
        {"stageDefaults": {"extraEnv": {"AWS_SECRET_ACCESS_KEY": "x"}}},
        "stageDefaults.extraEnv.AWS_SECRET_ACCESS_KEY looks like a secret",
    ),
    "a relative file": (
        {"dataset": {"source": "data/rows.jsonl"}},
        "dataset.source data/rows.jsonl is a relative path, which pods cannot read. Copy the file",
    ),
    "a workspace over the config": (
        {"workspace": {"mountPath": "/etc/llama-lora"}},
        "workspace.mountPath /etc/llama-lora is used by another mount of the chart. Use another path",
    ),
    "a token in an unrelated key": (
        {"dataset": {"config": f"hf_{'x' * 30}"}},
        "dataset.config contains a token or a key. Values can be read by anyone who can read the release. Remove it.",
    ),
    "an access key in a variable with a harmless name": (
        {"stages": {"tokenize": {"extraEnv": {"WHO": f"AKIA{'Q' * 16}"}}}},
        "stages.tokenize.extraEnv.WHO contains a token or a key",
    ),
    "a mount at a path of the chart": (
        {
            "stages": {
                "merge": {"extraVolumes": {"a": {"emptyDir": {}}}, "extraVolumeMounts": {"a": {"mountPath": "/tmp"}}}
            }
        },
        "stages.merge: extraVolumeMounts.a.mountPath /tmp is already used by another mount. Choose another path.",
    ),
    "a request above its limit": (
        {"stages": {"merge": {"resources": {"requests": {"memory": "9000Mi"}, "limits": {"memory": "8Gi"}}}}},
        "stages.merge: resources.requests.memory 9000Mi is more than resources.limits.memory 8Gi. Raise the limit",
    ),
    "a mount without a volume": (
        {"stages": {"merge": {"extraVolumeMounts": {"scratch": {"mountPath": "/scratch"}}}}},
        "stages.merge: extraVolumeMounts.scratch refers to an unknown volume. Add scratch to extraVolumes.",
    ),
    "a volume with a name of the chart": (
        {"stages": {"merge": {"extraVolumes": {"tmp": {"emptyDir": {}}}}}},
        "stages.merge: extraVolumes.tmp has the name of one of the chart's volumes. Choose another.",
    ),
    "another workspace by the environment": (
        {"stages": {"merge": {"extraEnv": {"LLAMA_LORA_WORKSPACE": "/elsewhere"}}}},
        "stages.merge: extraEnv.LLAMA_LORA_WORKSPACE is set by the chart. Use workspace.mountPath.",
    ),
    "one repository for two models": (
        {"publish": {"hub": {"adapter": "a/b", "merged": "a/b", "tokenSecret": "x"}}},
        "publish.hub.adapter and publish.hub.merged are both a/b",
    ),
    "a repository without a token": (
        {"publish": {"hub": {"merged": "a/b"}}},
        "publish.hub.tokenSecret is required to write to the Hub",
    ),
    "a token instead of a Secret's name": (
        {"huggingFace": {"tokenSecret": "hf_AbCdEfGhIj"}},
        "huggingFace.tokenSecret is not a valid name of a Secret. Set it to the name of a Secret, never to the token",
    ),
    "a token instead of its key": (
        {"publish": {"hub": {"tokenKey": "QwErTy/UiOp="}}},
        "publish.hub.tokenKey is not a valid key in a Secret. Set it to the key of the token, never to the token",
    ),
    "a token without a repository": (
        {"publish": {"hub": {"tokenSecret": "x"}}},
        "publish.hub.tokenSecret has no effect without publish.hub.adapter",
    ),
    "a report that is not made": (
        {"publish": {"s3": {"uri": "s3://bucket/a", "artifacts": ["report"]}}, "evaluation": {"enabled": False}},
        "publish.s3.artifacts has only the report",
    ),
    "a held-out loss without held-out rows": (
        {"training": {"evalSteps": 5}, "dataset": {"evalFraction": 0}, "evaluation": {"enabled": False}},
        "training.evalSteps requires held-out rows",
    ),
    "a threshold of nothing": (
        {"training": {"earlyStoppingThreshold": 0.1}},
        "training.earlyStoppingThreshold has no effect without",
    ),
    "a TrainJob that HyperPod should resume": (
        merged(NEURON, {"instance": "ml.trn1.32xlarge", "workload": "trainjob", "hyperpod": {"autoResume": True}}),
        "hyperpod.autoResume is true, but HyperPod resumes PyTorchJobs only. Set it to false",
    ),
    "a deadline of the gate": (
        {"stages": {"gate": {"activeDeadlineSeconds": 3600}}},
        "stages.gate.activeDeadlineSeconds would end the gate and with it guards.maxCost and guards.stallTimeout",
    ),
    "a deadline of the runner": (
        {"stages": {"runner": {"activeDeadlineSeconds": 3600}}},
        "stages.runner.activeDeadlineSeconds would end the runner in the middle of a stage, which goes on. Remove it.",
    ),
    "one account for all": (
        {"stageDefaults": {"serviceAccountName": "mine"}},
        "stageDefaults.serviceAccountName would give all stages the permissions of one. Set it for a stage",
    ),
    "a Secret's variable in a pod with permissions": (
        {"stages": {"gate": {"extraEnvSecrets": {"A": {"name": "a", "key": "a"}}}}},
        "stages.gate.extraEnvSecrets is not allowed: this stage has permissions in the cluster or runs as root",
    ),
    "variables of a ConfigMap in a pod with permissions": (
        {"stages": {"storagePrepare": {"extraEnvFrom": {"a": {"configMapRef": {"name": "a"}}}}}},
        "stages.storagePrepare.extraEnvFrom is not allowed: this stage has permissions in the cluster or runs as root",
    ),
    "the Hub's token of every stage": (
        {"stageDefaults": {"extraEnvSecrets": {"HF_TOKEN": {"name": "a", "key": "a"}}}},
        "stages.train: extraEnvSecrets.HF_TOKEN is set by the chart where it is needed. Use huggingFace.tokenSecret or",
    ),
    "a Secret's variable with a name of the chart": (
        {"stages": {"train": {"extraEnvSecrets": {"LLAMA_LORA_WORKSPACE": {"name": "a", "key": "a"}}}}},
        "stages.train: extraEnvSecrets.LLAMA_LORA_WORKSPACE has a name of the chart's variables. Remove it.",
    ),
    "a Secret that chooses the code": (
        {"stages": {"train": {"extraEnvSecrets": {"LD_PRELOAD": {"name": "a", "key": "a"}}}}},
        "stages.train: extraEnvSecrets.LD_PRELOAD decides which code runs, and is no secret. Use extraEnv.",
    ),
    "a variable with two values": (
        {
            "stageDefaults": {"extraEnv": {"WANDB_MODE": "offline"}},
            "stages": {"train": {"extraEnvSecrets": {"WANDB_MODE": {"name": "a", "key": "a"}}}},
        },
        "stages.train: WANDB_MODE is in extraEnv and in extraEnvSecrets. Remove one of them.",
    ),
    "variables from nowhere": (
        {"stages": {"train": {"extraEnvFrom": {"a": {"prefix": "A_"}}}}},
        "stages.train: extraEnvFrom.a requires exactly one of secretRef and configMapRef. Set one, e.g.",
    ),
    "variables from two objects": (
        {"stages": {"train": {"extraEnvFrom": {"a": {"secretRef": {"name": "a"}, "configMapRef": {"name": "a"}}}}}},
        "stages.train: extraEnvFrom.a requires exactly one of secretRef and configMapRef. Set one, e.g.",
    ),
    "all capabilities": (
        {"stages": {"train": {"capabilities": {"SYS_ADMIN": True}}}},
        "stages.train.capabilities.SYS_ADMIN is refused by Kubernetes, because the pods forbid privilege escalation.",
    ),
    "a profile without a path": (
        {"stages": {"train": {"seccompProfile": {"type": "Localhost"}}}},
        "stages.train: seccompProfile.localhostProfile is the path of a profile of type Localhost. Set both",
    ),
    "a capability with its prefix": (
        {"stages": {"train": {"capabilities": {"CAP_IPC_LOCK": True}}}},
        "stages.train.capabilities.CAP_IPC_LOCK has the prefix CAP_, which Kubernetes adds itself. Use IPC_LOCK.",
    ),
    "huge pages without a limit": (
        {"stages": {"merge": {"resources": {"requests": {"hugepages-2Mi": "4Mi"}}}}},
        "stages.merge: resources.requests.hugepages-2Mi 4Mi requires the same limit. Set resources.limits.huge",
    ),
    "parts of huge pages": (
        {"stages": {"evaluate": {"resources": {"limits": {"hugepages-2Mi": "5Mi"}}}}},
        "stages.evaluate: resources.limits.hugepages-2Mi 5Mi is not a multiple of 2Mi, the size of a page. Set it",
    ),
    "a label of a Job's pods": (
        {"stages": {"merge": {"podLabels": {"batch.kubernetes.io/job-name": "x"}}}},
        "stages.merge.podLabels.batch.kubernetes.io/job-name is a label that Jobs give their pods themselves. Remove",
    ),
    "no time to save": (
        {"stages": {"train": {"terminationGracePeriodSeconds": 10}}},
        "stages.train.terminationGracePeriodSeconds is 10, too short to save a checkpoint. Set it to at least 30.",
    ),
    "a grace period that no gate waits for": (
        {"stages": {"train": {"terminationGracePeriodSeconds": 301}}},
        "stages.train.terminationGracePeriodSeconds is 301, and gates wait 10 minutes for the pods of a stopped job",
    ),
    "a cleanup that gives up before the training has saved": (
        {"stages": {"compile": {"terminationGracePeriodSeconds": 300}}},
        "cleanup.timeoutSeconds is 180, which is too short for stages.compile.terminationGracePeriodSeconds 300. Set",
    ),
    "the launcher's time by the environment": (
        {"stages": {"train": {"extraEnv": {"LLAMA_LORA_GRACE_SECONDS": 300}}}},
        "stages.train: extraEnv.LLAMA_LORA_GRACE_SECONDS is set by the chart. Use terminationGracePeriodSeconds.",
    ),
    "a priority without a queue": (
        {"kueue": {"priorityClass": "high"}},
        "kueue.priorityClass has no effect without kueue.queueName. Set kueue.queueName to a LocalQueue, or remove",
    ),
    "a reservation without a provisioner": (
        {"capacityReservation": {"id": "cr-0123456789abcdef0"}},
        "capacityReservation has no effect without capacityReservation.provisioner. Set it to karpenter, auto-mode,",
    ),
    "a reservation that no label of a node group names": (
        {"capacityReservation": {"provisioner": "node-group", "id": "cr-0123456789abcdef0"}},
        "capacityReservation.id is not a label of the nodes of provisioner node-group. Use capacityReservation.group.",
    ),
    "a training plan without its group": (
        {"capacityReservation": {"provisioner": "hyperpod"}},
        "capacityReservation.group is required for provisioner hyperpod. Set it to the name of the group",
    ),
    "a group of Karpenter": (
        {"capacityReservation": {"provisioner": "karpenter", "group": "a"}},
        "capacityReservation.group applies to provisioner node-group and hyperpod. Use capacityReservation.id.",
    ),
    "a queue for every object": (
        {"commonLabels": {"kueue.x-k8s.io/queue-name": "a"}},
        "commonLabels.kueue.x-k8s.io/queue-name would be on every object. Use kueue.queueName, kueue.cpuQueueName or",
    ),
    "a queue that its gate does not know": (
        {"stages": {"train": {"jobLabels": {"kueue.x-k8s.io/queue-name": "a"}}}},
        "stages.train: jobLabels.kueue.x-k8s.io/queue-name could start a job before its gate releases it. Use",
    ),
    "an object of no kind": (
        {"extraObjects": {"a": {"apiVersion": "v1"}}},
        "extraObjects.a has no apiVersion or kind. Set both, e.g. {apiVersion: v1, kind: ConfigMap, data: {}}.",
    ),
    "an object whose templates write something else": (
        {"extraObjects": {"g": {"apiVersion": "v1", "kind": "ConfigMap", "data": {"a": 'b{{ "\\n- [" }}'}}}},
        "extraObjects.g is not valid YAML once its templates are replaced (error converting YAML to JSON: yaml: line",
    ),
    "a Secret in the values": (
        {"extraObjects": {"a": {"apiVersion": "v1", "kind": '{{ "Secret" }}', "stringData": {"a": "b"}}}},
        "extraObjects.a is a Secret, whose content anyone could read who can read the release. Use kubectl create",
    ),
    "a list of objects": (
        {
            "extraObjects": {
                "c": {"apiVersion": "v1", "kind": "List", "items": [{"apiVersion": "v1", "kind": "Secret"}]}
            }
        },
        "extraObjects.c is a List, whose items the chart does not check. Set each item as an object of its own",
    ),
    "an object of the chart": (
        {
            "extraObjects": {
                "d": {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-config"}}
            }
        },
        "extraObjects.d is ConfigMap llama-config, which is an object of the chart. Set metadata.name to another name.",
    ),
    "an object twice": (
        {
            "extraObjects": {
                "e": {"apiVersion": "v1", "kind": "Service"},
                "f": {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "e"}},
            }
        },
        "extraObjects.f is Service e, as is extraObjects.e. Remove one of them, or set metadata.name to another name.",
    ),
    "a workspace over the programs": (
        {"workspace": {"mountPath": "/usr"}},
        "workspace.mountPath /usr would hide a directory of the image. Use another path, e.g. /workspace.",
    ),
    "a mount over the programs": (
        {
            "stages": {
                "merge": {
                    "extraVolumes": {"a": {"emptyDir": {}}},
                    "extraVolumeMounts": {"a": {"mountPath": "/x/../etc"}},
                }
            }
        },
        "stages.merge: extraVolumeMounts.a.mountPath /x/../etc would hide a directory of the image. Choose a path",
    ),
    "MLflow without a server": (
        {"monitoring": {"mlflow": True}},
        "monitoring.mlflow requires stages.train.extraEnv.MLFLOW_TRACKING_URI",
    ),
    "credentials that nothing reads": ({"monitoring": {"secretName": "x"}}, "monitoring.secretName has no effect"),
}


UNRENDERED = ", with which Helm cannot render YAML. Remove it."  # of a character: test_value_rules
LONG_NAME = "pipeline.mode detached requires a release name of at most 49 characters"


MISFITS_TOGETHER = together(values for values, _ in MISFITS.values())
CONTRADICTIONS_TOGETHER = together(values for values, _ in CONTRADICTIONS.values())


@pytest.mark.parametrize(("values", "key"), MISFITS.values(), ids=MISFITS)
def test_values_that_violate_the_schema_are_rejected_with_their_key(values: Values, key: str) -> None:
    assert not SCHEMA.is_valid(merged(DEFAULTS, MINIMAL, values))
    group = next(each for each in MISFITS_TOGETHER if merged(each, values) == each)
    message = refusal(group)
    assert "the schema" in message
    assert any(key in line.replace("/", ".") or key in line for line in findings(message)), message


@pytest.mark.repeat
@pytest.mark.parametrize(("values", "key"), MISFITS.values(), ids=MISFITS)
def test_helm_3_rejects_values_that_violate_the_schema_with_their_key(values: Values, key: str) -> None:
    lines = findings(refusal(values, 3))
    assert lines and all(key in line.replace("/", ".") or key in line for line in lines), lines


def findings(message: str) -> list[str]:
    return [line for line in message.splitlines() if line.lstrip().startswith("- ")]


@pytest.mark.parametrize(("values", "words"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_keys_that_contradict_each_other_are_rejected_with_a_fix(values: Values, words: str, helm: int) -> None:
    if helm == 4:
        assert refused_with(words, values, CONTRADICTIONS_TOGETHER)
    else:
        assert words in refusal(values, helm)


def test_helm_3_refuses_what_helm_4_does_with_the_same_words() -> None:
    """A tenth of each table; all of them in `make test-slow`."""
    for values, key in list(MISFITS.values())[::10]:
        message = refusal(values, 3)
        assert "the schema" in message and (key in message.replace("/", ".") or key in message), message
    for values, words in list(CONTRADICTIONS.values())[::10]:
        assert words in refusal(values, 3)


@pytest.mark.parametrize("text", ["{{ .Values.nothing.here }}", "{{ nosuch }}", "{{ .Release.Name"])
def test_helms_message_of_a_template_that_fails_names_its_object(text: str, helm: int) -> None:
    data = {"data": {"a": text}}
    objects = {name: {"apiVersion": "v1", "kind": "ConfigMap"} for name in ("good", "bad {{ x")}
    assert "# extraObjects.bad x" in refusal({"extraObjects": merged(objects, {"bad {{ x": data})}, helm)


def test_all_contradictions_are_reported_at_once(helm: int) -> None:
    values: Values = {"model": {"id": ""}, "dataset": {"format": ""}, "storage": {"enabled": False}}
    message = refusal(values, helm)
    for key in ("model.id", "dataset.format", "storage.existingClaim"):
        assert key in message


def test_a_release_name_too_long_for_the_runner_is_rejected(helm: int) -> None:
    message = refusal({"pipeline": {"mode": "detached"}}, helm, release="r" * 50)
    assert LONG_NAME in message
    assert render(merged(MINIMAL, {"pipeline": {"mode": "detached"}}), helm=helm, release="r" * 49)


@pytest.mark.parametrize("workload", ["pytorchjob", "trainjob"])
@pytest.mark.parametrize("mode", ["attached", "detached"])
def test_no_further_object_has_the_name_of_one_of_the_charts(workload: str, mode: str) -> None:
    values: Values = {
        "workload": workload,
        "pipeline": {"mode": mode},
        "rehearse": {"enabled": True},
        "publish": {"s3": {"uri": "s3://bucket/run"}},
        "monitoring": {"pushgateway": "http://[::1]:9091/x", "wandb": True},
        "networkPolicy": {"enabled": True},
        "rbac": {"clusterScopedReads": True},
    }
    fsx: Values = {"createStorageClass": True, "subnetId": "subnet-01234567", "securityGroupIds": ["sg-01234567"]}
    values["storage"] = {"kind": "fsx", "size": "1200Gi", "fsx": fsx}
    objects = render(merged(MINIMAL, values))
    same = {
        f"n{number}": {
            "apiVersion": each["apiVersion"],
            "kind": each["kind"],
            "metadata": {"name": each["metadata"]["name"]},
        }
        for number, each in enumerate(objects)
    }
    message = refusal(merged(values, {"extraObjects": same}))
    for name, each in same.items():
        assert f"extraObjects.{name} is {each['kind']} {each['metadata']['name']}, which is an object" in message


def test_every_message_has_a_fix_and_a_test() -> None:
    text = (CHART / "templates/_validations.tpl").read_text()
    text = re.sub(r"\{\{- /\*.*?\*/\}\}", "", text, flags=re.DOTALL)
    messages = [line for line in text.splitlines() if line and not line.startswith("{{-")]
    assert len(messages) > 20
    tested = " ".join(words for _, words in CONTRADICTIONS.values()) + LONG_NAME + UNRENDERED
    for message in messages:
        verbs = r"\b(Set|Keep|Remove|Use|Name|Copy|Add|Choose|Raise|Put)\b|\$fix"
        assert re.search(verbs, message.partition(". ")[2]), f"no fix: {message}"
        literal = [part.strip()[:30] for part in re.split(r"\{\{.*?\}\}", message) if part.strip(" .")]
        assert any(part in tested for part in literal), f"not tested: {message}"


# Concatenated, so that secret scanners find no token in this repository.
TOKENS = {
    "Hugging Face": "hf_" + "aB3" * 12,
    "AWS": "AK" + "IA" + "ABCDEFGH12345678",
    "AWS, for a session": "AS" + "IA" + "ABCDEFGH12345678",
    "private key": "-----BE" + "GIN OPENSSH PRIVATE KEY-----\nabc",
}


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
def test_a_token_is_rejected_anywhere_in_the_values_and_never_shown(token: str, helm: int) -> None:
    stages = {"train": {"extraEnv": {"OPTIONS": f"--auth={token}"}}, "merge": {"podAnnotations": {"note": token}}}
    values: Values = {
        "model": {"id": "", "path": f"/workspace/{token}"},
        "dataset": {"source": f"s3://bucket/{token}/rows.jsonl", "config": token, "columns": {"text": token}},
        "storage": {"mountOptions": ["flock", token]},
        "huggingFace": {"tokenSecret": token, "tokenKey": token},
        "publish": {"hub": {"tokenSecret": token, "tokenKey": token}},
        "monitoring": {"secretName": token},
        "stageDefaults": {"extraEnv": {"WHO": token}},
        "stages": stages,
    }
    message = refusal(values, helm)
    for key in [
        *("model.path", "dataset.source", "dataset.config", "dataset.columns.text", "storage.mountOptions"),
        *("huggingFace.tokenSecret", "huggingFace.tokenKey", "publish.hub.tokenSecret", "publish.hub.tokenKey"),
        *("monitoring.secretName", "stageDefaults.extraEnv.WHO"),
        *("stages.train.extraEnv.OPTIONS", "stages.merge.podAnnotations.note"),
    ]:
        assert f"  {key} contains a token or a key" in message
    assert token.splitlines()[0] not in message


def patterned(rules: dict[str, Any], key: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys of a schema that have a pattern; a is a name that the user chooses, and - an item of a list."""
    rules = SCHEMA.schema["definitions"]["stage"] if "$ref" in rules else rules
    if "pattern" in rules.get("then", {}):
        yield key
    inner = [*rules.get("properties", {}).items(), ("a", rules.get("additionalProperties")), ("-", rules.get("items"))]
    for name, below in [*inner, *(("a", named) for named in rules.get("patternProperties", {}).values())]:
        if isinstance(below, dict):
            yield from patterned(below, (*key, name))


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
def test_a_token_in_a_key_that_has_a_pattern_is_not_shown_by_the_schema(token: str, helm: int) -> None:
    token = token[:23]  # shorter than the limits of length
    keys = [key for key in patterned(SCHEMA.schema) if key[0] != "stages" or key[1] == "merge"]
    assert len(keys) > 100
    values: Values = {"dataset": {"additional": {"a": {"source": "a/b"}}}}
    for key in keys:
        written: Any = token
        for name in reversed(key):
            written = [written] if name == "-" else {name: written}
        values = merged(values, written)
    for settings in (values["stageDefaults"], values["stages"]["merge"]):
        settings["topologySpreadConstraints"][0] |= {"maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule"}
        settings["seccompProfile"]["type"] = "Localhost"
    message = refusal(values, helm)
    for key in keys:
        assert f"  {'.'.join(name for name in key if name != '-')} contains a token or a key" in message
    assert token not in message


def test_an_environment_variable_named_like_a_secret_is_rejected(helm: int) -> None:
    names = ["HF_TOKEN", "aws_secret_access_key", "AWS_ACCESS_KEY_ID", "APIKEY", "SSH_KEY", "DB_PASSWD"]
    message = refusal({"stages": {"train": {"extraEnv": dict.fromkeys(names, "x")}}}, helm)
    for name in names:
        assert f"stages.train.extraEnv.{name} looks like a secret" in message


def test_values_that_only_resemble_a_secret_are_accepted(helm: int) -> None:
    variables = {"TOKENIZERS_PARALLELISM": False, "MONKEY": "hf_transfer", "WHO": "AKIA"}
    variables |= {"HF_HUB_DISABLE_IMPLICIT_TOKEN": True, "USE_TOKEN": "1", "KEEP_SECRET": "no"}
    values: Values = {"model": {"id": "hf_org/shelf_" + "a" * 40}, "stageDefaults": {"extraEnv": variables}}
    assert render(merged(MINIMAL, values), helm=helm)


def test_mount_paths_of_the_chart_or_another_volume_are_rejected(helm: int) -> None:
    own = {mount["mountPath"] for each in pods(render(MINIMAL)) for mount in each.containers[0]["volumeMounts"]}
    assert len(own) == 4
    for path in [*own - {"/workspace"}, "/etc/llama-lora/work"]:
        assert f"workspace.mountPath {path} is used by another mount" in refusal(
            {"workspace": {"mountPath": path}}, helm
        )
    volumes = {name: {"emptyDir": {}} for name in "abcdefgh"}
    paths = ["/mine", *sorted(own), "/tmp/", "/etc/llama-lora/x", "//mine"]
    mounts = {name: {"mountPath": path} for name, path in zip(volumes, paths, strict=True)}
    message = refusal({"stages": {"merge": {"extraVolumes": volumes, "extraVolumeMounts": mounts}}}, helm)
    for name, path in list(zip(volumes, paths, strict=True))[1:]:
        assert f"extraVolumeMounts.{name}.mountPath {path} is already used" in message
    assert "/mine is already used" not in message.replace("//mine", "")


def of_merge(resource: str, request: object, limit: object) -> Values:
    return {"stages": {"merge": {"resources": {"requests": {resource: request}, "limits": {resource: limit}}}}}


OVER = [("cpu", 2, "1500m"), ("cpu", "1501m", 1.5), ("memory", "1Gi", "1G"), ("memory", "2Ti", "2047Gi")]
WITHIN = [("cpu", "1500m", 1.5), ("cpu", 2, "2"), ("memory", "1G", "1Gi"), ("memory", "1024Mi", "1Gi")]


def test_requests_are_compared_with_limits_as_quantities(helm: int) -> None:
    for resource, request, limit in OVER:
        message = refusal(of_merge(resource, request, limit), helm)
        assert f"stages.merge: resources.requests.{resource} {request} is more than resources.limits" in message
    for resource, request, limit in WITHIN:
        assert render(merged(MINIMAL, of_merge(resource, request, limit)), helm=helm)


def test_sources_that_pods_can_read_are_accepted(helm: int) -> None:
    """`genvalues local` uses absolute paths that are not on a volume."""
    sources = [
        *("/elsewhere/rows.jsonl", "/elsewhere/", "/elsewhere/*.jsonl.gz", "org/rows", "rows", "org/json"),
        *("s3://bucket/rows.csv", "s3://bucket/rows/", "s3://bucket/*.csv"),
    ]
    additional = {f"s{number}": {"source": source} for number, source in enumerate(sources)}
    assert render(merged(MINIMAL, {"dataset": {"source": sources[0], "additional": additional}}), helm=helm)


def test_a_cleanup_that_is_off_limits_no_grace_period(helm: int) -> None:
    values: Values = {"cleanup": {"enabled": False}, "stages": {"train": {"terminationGracePeriodSeconds": 300}}}
    assert render(merged(MINIMAL, values), helm=helm)
