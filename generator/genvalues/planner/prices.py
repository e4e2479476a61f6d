"""What a node-hour costs, by the committed table."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

TABLE = Path(__file__).with_name("prices.json")


class Price(NamedTuple):
    """Dollars for one node and hour. ``kind`` says how it is bought, ``dated`` when that was the price."""

    dollars: float
    kind: str
    region: str = ""
    dated: str = ""


@functools.lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return read


def price_per_node_hour(instance: str, region: str | None) -> Price | None:
    """The table's price. Without a region: the one of all regions of the table, where they agree."""
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
    """The region of an image in ECR, ACCOUNT.dkr.ecr.REGION.amazonaws.com/..., where its nodes are as a rule."""
    registry, slash, _ = (image or "").partition("/")
    host = registry.split(".")
    return host[3] if slash and len(host) > 5 and host[1:3] == ["dkr", "ecr"] and host[4] == "amazonaws" else None
