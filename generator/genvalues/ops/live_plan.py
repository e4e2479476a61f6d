"""The plan of `genvalues plan`: that of `genvalues write`, with the Hub's row count and, with --live, today's price."""

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
from genvalues.ops.aws import AwsClients, Missing, translate_aws_errors
from genvalues.ops.trace import with_trace
from genvalues.planner.planning import Plan
from genvalues.planner.prices import Price, Priced, known_price, region_of
from genvalues.settings.inputs import Inputs

PRICING_REGION = "us-east-1"  # has the prices of all regions (AWS docs, Using the AWS Price List Query API)
WRITE_PRICE = "Write guards.pricePerNodeHour"


def planned(
    sources: Sources, *, live: bool = False, offline: bool = False, region: str | None = None, trace: bool = False
) -> Plan:
    """The plan for these inputs. Raises all mistakes in the inputs, and UserError for options that conflict."""
    if live and offline:
        raise UserError("asks AWS: cannot be combined with --offline", where="--live", fix="Omit one of the two.")
    if region is not None and not re.match(r"^[a-z]{2}(-[a-z]+)+-[0-9]\Z", region):
        raise UserError(f"{region[:40]!r} is not an AWS region", where="--region", fix="Write one such as us-west-2.")

    def price(inputs: Inputs) -> Priced:
        if not live or inputs.on_cpu:
            return known_price(inputs, region)
        where = region or region_of(inputs.image)
        if where is None:
            raise UserError("needs a region", where="--live", fix="Write --region, such as us-west-2.")
        return Priced(live_price(inputs.instance, where))

    found = checked(sources, offline, price, count_rows=True)
    return with_trace(found) if trace else found.plan


def live_price(instance: str, region: str, client: Any = None) -> Price:
    """Today's on-demand price of the AWS Pricing API (GetProducts).

    Raises UserError if the API has no single price or rejects the credentials, and Unavailable if it does not answer.
    ``client`` is a boto3 client of "pricing"; created here by default.
    """
    service, filters = product_filters(instance, region)
    prices: set[float] = set()
    with suppress(Missing), translate_aws_errors("--live", "pricing:GetProducts", f"{WRITE_PRICE}."):
        products = (client or AwsClients(PRICING_REGION).client("pricing")).get_paginator("get_products")
        pages = products.paginate(
            ServiceCode=service,
            Filters=[{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in filters.items()],
        )
        prices.update(hourly_dollars(json.loads(product) for page in pages for product in page["PriceList"]))
    if len(prices) != 1:
        several = f"has {len(prices)} prices" if prices else "has no price"
        raise UserError(
            f"the AWS Pricing API {several} for {instance} in {region}",
            where="--live",
            fix=f"{WRITE_PRICE}, or another --region.",
        )
    return Price(prices.pop(), "AWS Pricing API, on demand", region, "today")


def product_filters(instance: str, region: str) -> tuple[str, dict[str, str]]:
    """The service code, and filters by attribute.

    HyperPod nodes are billed as SageMaker's component Cluster (USE1-Cluster:ml.TYPE).
    """
    if instance.startswith(HYPERPOD):
        return "AmazonSageMaker", {"regionCode": region, "component": "Cluster", "instanceType": f"{instance}-Cluster"}
    return "AmazonEC2", {
        "regionCode": region,
        "instanceType": instance,
        "operatingSystem": "Linux",
        "tenancy": "Shared",
        "preInstalledSw": "NA",
        "capacitystatus": "Used",
    }


def hourly_dollars(products: Iterable[dict[str, Any]]) -> Iterable[float]:
    """The prices per hour of the products' on-demand terms, in dollars."""
    for product in products:
        if "Reserved" in product.get("product", {}).get("attributes", {}).get("usagetype", ""):
            continue  # flexible training plans, which SageMaker lists as an on-demand term
        for term in product.get("terms", {}).get("OnDemand", {}).values():
            for dimension in term.get("priceDimensions", {}).values():
                dollars = float(dimension.get("pricePerUnit", {}).get("USD", 0))
                if dollars > 0 and dimension.get("unit", "").lower() in ("hrs", "hours", "hour"):
                    yield dollars
