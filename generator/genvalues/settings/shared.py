"""Settings that inputs and values share and no stage reads: limits, storage, the Hugging Face token."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from genvalues.settings.base import DNS_NAME, LARGE, Block, optional

# What storage keys mean that are left out, by storage.kind.
STORAGE_BY_KIND = {
    "fsx": {"size": "1200Gi", "storageClass": "fsx-sc"},
    "fsx-static": {"size": "1200Gi", "storageClass": ""},
    "generic": {"size": "100Gi", "storageClass": ""},
}
# FSx API reference, CreateFileSystemLustreConfiguration and CreateFileSystem: MB/s per TiB of SSD file systems, and the
# size in GiB that sizes above 2400Gi are a multiple of.
FSX_TYPES: dict[str, dict[str, Any]] = {
    "SCRATCH_1": {"throughputs": [], "unit": 3600},
    "SCRATCH_2": {"throughputs": [], "unit": 2400},
    "PERSISTENT_1": {"throughputs": [50, 100, 200], "usual": 200, "unit": 2400},
    "PERSISTENT_2": {"throughputs": [125, 250, 500, 1000], "usual": 250, "unit": 2400},
}
DURATION = r"([0-9]{1,4}h)?([0-9]{1,5}m)?([0-9]{1,6}s)?"
StallTimeout = Annotated[
    str,
    Field(
        pattern=f"^{DURATION}$",
        max_length=32,
        description="End train after this long without a step while all its pods run, such as 45m or 1h30m. Empty: "
        "never. Must be longer than what precedes the first step: reading the model, for which genvalues adds a minute "
        "for each GiB beyond 8B with xla, and with compile.onMismatch: warn compiling, which can take an hour.",
    ),
]
StorageKind = Annotated[
    Literal["fsx", "fsx-static", "generic"],
    Field(
        description="fsx: a new FSx for Lustre file system (about 10 minutes). fsx-static: an existing one. generic: "
        "any storage class."
    ),
]
Size = Annotated[
    str,
    Field(
        pattern=r"^[1-9][0-9]{0,6}(Mi|Gi|Ti)$",
        description="Size of the claim. FSx: 1200Gi, 2400Gi or a multiple of 2400Gi.",
    ),
]
StorageClass = Annotated[
    str,
    Field(
        pattern=optional(DNS_NAME),
        max_length=253,
        description="Storage class of the claim. Empty (kind generic only): the cluster's default class.",
    ),
]
ExistingClaim = Annotated[
    str,
    Field(
        pattern=optional(DNS_NAME),
        max_length=253,
        description="An existing PersistentVolumeClaim of the release's namespace to use instead of creating one.",
    ),
]
TokenSecret = Annotated[
    str,
    Field(
        pattern=optional(DNS_NAME),
        max_length=253,
        description="Name of the Secret that holds the token, never the token itself. Empty: no token.",
    ),
]
TokenKey = Annotated[
    str, Field(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253, description="Key of the token in the Secret.")
]


class GuardOptions(Block):
    """Limits that end compile and train early: a checkpoint is saved, the nodes are freed, and the release fails
    with the reason. See docs/operations.md.
    """

    max_cost: float | None = Field(
        None,
        gt=0,
        le=LARGE,
        description="Dollars that the run's nodes may cost, over all upgrades and retries. Requires pricePerNodeHour.",
    )
    price_per_node_hour: float | None = Field(
        None, gt=0, le=LARGE, description="Dollars per node and hour, by which the cost is counted."
    )


class FileSystem(Block):
    """kind fsx-static: the file system, as `aws fsx describe-file-systems` shows it."""

    file_system_id: str = Field(
        "", pattern=r"^(fs-[0-9a-f]{8,40})?$", description="FileSystemId, such as fs-0123456789abcdef0."
    )
    dns_name: str = Field(
        "",
        pattern=optional(DNS_NAME),
        max_length=253,
        description="DNSName, such as fs-0123456789abcdef0.fsx.us-west-2.amazonaws.com.",
    )
    mount_name: str = Field(
        "", pattern=r"^[A-Za-z0-9_-]{0,64}$", description="LustreConfiguration.MountName: fsx, or 8 characters."
    )


class HuggingFace(Block):
    """The Secret with the Hugging Face token for gated models. The tokenize stage gets it as HF_TOKEN, and publish
    does if it has no Secret of its own. Create it with
    kubectl create secret generic hf-token --from-file=token=/dev/stdin, so that the token is in no command line.
    """

    token_secret: TokenSecret = ""
    token_key: TokenKey = "token"
