"""Provision a volume for each claim of the tests' storage classes: a local folder with the owner that the class names.

Runs as a process: provisioner.py KUBECONFIG FOLDER
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from kubernetes import client, config

PROVISIONER = "tests.llama-lora/folder"
USER = 1000
# Class: owner of the folder; binding mode; whether it is the default class.
CLASSES = {
    "folder": (USER, "Immediate", "true"),
    "folder-of-root": (0, "Immediate", "false"),  # like a new FSx for Lustre: owned by root, mode 0755
    "folder-on-first-use": (USER, "WaitForFirstConsumer", "false"),
    "nobody-makes-it": (None, "Immediate", "false"),
}
DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
SELECTED_NODE = "volume.kubernetes.io/selected-node"


def storage_class(name: str) -> dict[str, Any]:
    owner, binding, is_default = CLASSES[name]
    return {
        "metadata": {"name": name, "annotations": {DEFAULT_CLASS: is_default}},
        "provisioner": PROVISIONER if owner is not None else "absent.llama-lora/nobody",
        "volumeBindingMode": binding,
        "reclaimPolicy": "Delete",
    }


def volume(claim: Any, folder: Path) -> dict[str, Any]:
    name, namespace = claim.metadata.name, claim.metadata.namespace
    reference = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "name": name, "namespace": namespace}
    return {
        "metadata": {"name": folder.name, "annotations": {"pv.kubernetes.io/provisioned-by": PROVISIONER}},
        "spec": {
            "accessModes": claim.spec.access_modes,
            "capacity": {"storage": claim.spec.resources.requests["storage"]},
            "claimRef": {**reference, "uid": claim.metadata.uid},
            "hostPath": {"path": str(folder), "type": "Directory"},
            "persistentVolumeReclaimPolicy": "Retain",  # removed by this process
            "storageClassName": claim.spec.storage_class_name,
        },
    }


def provision(core: client.CoreV1Api, folder: Path) -> None:
    for claim in core.list_persistent_volume_claim_for_all_namespaces().items:
        owner, binding, _ = CLASSES.get(claim.spec.storage_class_name, (None, "", ""))
        waits = binding == "WaitForFirstConsumer" and SELECTED_NODE not in (claim.metadata.annotations or {})
        if owner is None or waits or claim.status.phase != "Pending" or claim.spec.volume_name:
            continue
        place = folder / f"{claim.metadata.namespace}.{claim.metadata.name}.{claim.metadata.uid[:8]}"
        if not place.exists():
            place.mkdir(parents=True)
            os.chown(place, owner, owner)
            core.create_persistent_volume(volume(claim, place))


def remove_released(core: client.CoreV1Api, folder: Path) -> None:
    for made in core.list_persistent_volume().items:
        if made.status.phase == "Released" and made.spec.storage_class_name in CLASSES:
            core.delete_persistent_volume(made.metadata.name)
            shutil.rmtree(folder / made.metadata.name, ignore_errors=True)


def main(kubeconfig: str, folder: str) -> None:
    config.load_kube_config(kubeconfig)
    core, storage = client.CoreV1Api(), client.StorageV1Api()
    for name in CLASSES:
        storage.create_storage_class(storage_class(name))
    for turn in itertools.count():
        try:
            provision(core, Path(folder))
            if turn % 20 == 0:  # nothing waits for it
                remove_released(core, Path(folder))
        except Exception as error:  # a test stops the API server for a moment
            print(type(error).__name__, str(error)[:200], flush=True)
        time.sleep(0.5)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
