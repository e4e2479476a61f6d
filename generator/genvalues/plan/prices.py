"""What a node-hour costs: a committed table, or the AWS Pricing API where it is asked for."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from genvalues.aws import Missing, told
from genvalues.errors import UserError
from genvalues.instances import HYPERPOD

TABLE = Path(__file__).with_name("prices.json")
PRICING_API = "us-east-1"  # one of the few regions that answer for all (AWS docs, Using the AWS Price List Query API)
TIMEOUT = 10  # seconds, for connecting and for an answer
WRITE_PRICE = "Write guards.pricePerNodeHour"


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


def live_price(instance: str, region: str, client: Any = None) -> Price:
    """Today's on-demand price of the AWS Pricing API (GetProducts).

    Raises UserError where the API has no such price, or takes no question from these credentials, Unavailable where it
    does not answer. ``client`` is boto3's of "pricing"; made here when left out.
    """
    service, filters = _product(instance, region)
    prices: set[float] = set()
    with suppress(Missing), told("--live", needs="pricing:GetProducts", look=f"{WRITE_PRICE}."):
        products = (client or _client()).get_paginator("get_products")
        pages = products.paginate(
            ServiceCode=service,
            Filters=[{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in filters.items()],
        )
        prices.update(_hourly(json.loads(product) for page in pages for product in page["PriceList"]))
    if len(prices) != 1:
        several = f"has {len(prices)} prices" if prices else "has no price"
        raise UserError(
            f"the AWS Pricing API {several} for {instance} in {region}",
            where="--live",
            fix=f"{WRITE_PRICE}, or another --region.",
        )
    return Price(prices.pop(), "AWS Pricing API, on demand", region, "today")


def _product(instance: str, region: str) -> tuple[str, dict[str, str]]:
    """Service code and filters. HyperPod nodes are billed as SageMaker's component Cluster, USE1-Cluster:ml.TYPE."""
    if instance.startswith(HYPERPOD):
        return "AmazonSageMaker", {
            "regionCode": region,
            "component": "Cluster",
            "instanceType": f"{instance}-Cluster",
        }
    return "AmazonEC2", {
        "regionCode": region,
        "instanceType": instance,
        "operatingSystem": "Linux",
        "tenancy": "Shared",
        "preInstalledSw": "NA",
        "capacitystatus": "Used",
    }


def _hourly(products: Iterable[dict[str, Any]]) -> Iterable[float]:
    """Dollars an hour, of the on-demand terms that have any."""
    for product in products:
        if "Reserved" in product.get("product", {}).get("attributes", {}).get("usagetype", ""):
            continue  # flexible training plans and the like, sold on an on-demand term of SageMaker's
        for term in product.get("terms", {}).get("OnDemand", {}).values():
            for dimension in term.get("priceDimensions", {}).values():
                dollars = float(dimension.get("pricePerUnit", {}).get("USD", 0))
                if dollars > 0 and dimension.get("unit", "").lower() in ("hrs", "hours", "hour"):
                    yield dollars


def _client() -> Any:
    import boto3
    from botocore.config import Config

    config = Config(connect_timeout=TIMEOUT, read_timeout=TIMEOUT, retries={"total_max_attempts": 1})
    return boto3.client("pricing", region_name=PRICING_API, config=config)
