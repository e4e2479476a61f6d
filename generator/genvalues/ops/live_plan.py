"""`genvalues plan`: the plan that `genvalues write` writes, with today's price and what the Hub has counted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from genvalues.accelerators.instances import HYPERPOD
from genvalues.common.errors import UserError
from genvalues.inputs.input_options import Sources
from genvalues.inputs.write import checked
from genvalues.ops.aws import Missing, translate_errors
from genvalues.planner.planning import Plan
from genvalues.planner.prices import Price, Priced, known_price, region_of
from genvalues.settings.inputs import Inputs

PRICING_API = "us-east-1"  # one of the few regions that answer for all (AWS docs, Using the AWS Price List Query API)
TIMEOUT = 10  # seconds, for connecting and for an answer
WRITE_PRICE = "Write guards.pricePerNodeHour"


def planned(sources: Sources, *, live: bool, offline: bool, region: str | None) -> Plan:
    """Raises every mistake in the inputs, and UserError for options that contradict one another."""
    if live and offline:
        raise UserError("asks AWS, which --offline forbids", where="--live", fix="Leave one of the two out.")
    if region is not None and not re.match(r"^[a-z]{2}(-[a-z]+)+-[0-9]\Z", region):
        raise UserError(f"{region[:40]!r} is no AWS region", where="--region", fix="Write one such as us-west-2.")

    def price(inputs: Inputs) -> Priced:
        if not live or inputs.on_cpu:
            return known_price(inputs, region)
        where = region or region_of(inputs.image)
        if where is None:
            raise UserError("needs a region", where="--live", fix="Write --region, such as us-west-2.")
        return Priced(live_price(inputs.instance, where))

    return checked(sources, offline, price, count_rows=True).plan


def live_price(instance: str, region: str, client: Any = None) -> Price:
    """Today's on-demand price of the AWS Pricing API (GetProducts).

    Raises UserError where the API has no such price, or takes no question from these credentials, Unavailable where it
    does not answer. ``client`` is boto3's of "pricing"; made here when left out.
    """
    service, filters = _product(instance, region)
    prices: set[float] = set()
    with suppress(Missing), translate_errors("--live", needs="pricing:GetProducts", look=f"{WRITE_PRICE}."):
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
