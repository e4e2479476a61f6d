"""The price of a node-hour: from the inputs, else from the committed table."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from genvalues.accelerators.instances import HYPERPOD
from genvalues.settings.images import ECR
from genvalues.settings.inputs import Inputs

TABLE = Path(__file__).with_name("prices.json")


class Price(NamedTuple):
    """Dollars per node and hour. ``kind``: how it is bought, or its source; ``dated``: the day of the price."""

    dollars: float
    kind: str
    region: str = ""
    dated: str = ""


class Priced(NamedTuple):
    """The price of a node-hour; or why it is unknown and, for HyperPod, EC2's price in the same region."""

    price: Price | None
    unknown: str = ""
    on_ec2: Price | None = None


def known_price(inputs: Inputs, region: str | None = None) -> Priced:
    """The inputs' guards.pricePerNodeHour, else the table's price in ``region`` (None: the image's)."""
    written = inputs.guards.price_per_node_hour
    if written is not None:
        return Priced(Price(written, "guards.pricePerNodeHour"))
    if inputs.on_cpu:
        return Priced(None, "the price of a CPU node depends on its type")
    region = region or region_of(inputs.image)
    if found := price_per_node_hour(inputs.instance, region):
        return Priced(found)
    unknown = f"no price known for {inputs.instance}" + (f" in {region}" if region else "")
    unknown += "; set guards.pricePerNodeHour, or use --live"
    # EC2's price for a HyperPod instance is shown, but never used as guards.pricePerNodeHour.
    on_ec2 = None
    if inputs.instance.startswith(HYPERPOD):
        plain = inputs.instance.removeprefix(HYPERPOD)
        on_ec2 = price_per_node_hour(plain, region)
        if on_ec2:
            unknown += f" (for comparison: EC2 charges ${on_ec2.dollars:.2f} for {plain} in {on_ec2.region})"
    return Priced(None, unknown, on_ec2)


@functools.lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return read


def price_per_node_hour(instance: str, region: str | None) -> Price | None:
    """The table's price. Without a region, the price of all regions in the table if it is the same."""
    if region is not None:
        return _row(instance, region)
    found = [price for region in table()["regions"] if (price := _row(instance, region)) is not None]
    if not found or len({price.dollars for price in found}) > 1:
        return None
    return Price(found[0].dollars, found[0].kind, ", ".join(price.region for price in found), found[0].dated)


def _row(instance: str, region: str) -> Price | None:
    row = table()["regions"].get(region, {}).get(instance)
    return Price(row[0], row[1], region, table()["dated"]) if row else None


def region_of(image: str | None) -> str | None:
    """The region of an image in ECR, usually that of the nodes."""
    found = ECR.fullmatch((image or "").partition("/")[0])
    return found["region"] if found else None
