"""The committed table, and the AWS Pricing API behind botocore's Stubber."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import EndpointConnectionError, NoCredentialsError, UnauthorizedSSOTokenError
from botocore.stub import ANY, Stubber

from genvalues.accelerators.instances import NAMES
from genvalues.common.errors import Unavailable, UserError
from genvalues.ops import aws
from genvalues.ops.live_plan import live_price
from genvalues.planner.prices import Price, price_per_node_hour, region_of, table


@pytest.mark.parametrize(
    ("instance", "region", "dollars"),
    [
        ("trn1.2xlarge", "us-east-1", 1.34375),
        ("trn1.32xlarge", "us-west-2", 21.5),
        ("trn1n.32xlarge", "us-east-2", 24.78),
        ("trn2.48xlarge", "us-east-2", 35.76),
        ("trn1.32xlarge", None, 21.5),
        ("trn1.32xlarge", "eu-west-1", None),
        ("trn2.48xlarge", "us-west-2", None),
        ("ml.trn1.32xlarge", "us-east-1", None),
        ("ml.trn2.48xlarge", None, None),
        ("cpu", None, None),
    ],
)
def test_the_table_has_a_price_or_none(instance: str, region: str | None, dollars: float | None) -> None:
    price = price_per_node_hour(instance, region)
    assert (price and price.dollars) == dollars


def test_every_row_is_dated_with_a_source_and_a_plausible_price() -> None:
    datetime.date.fromisoformat(table()["dated"])
    for rows in table()["regions"].values():
        for instance, row in rows.items():
            assert instance in NAMES
            assert row is None or (1 < row[0] < 100 and row[1] in table()["sources"])


def test_without_a_region_different_prices_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    prices = {"us-east-1": {"trn1.2xlarge": [1.0, "a"]}, "us-west-2": {"trn1.2xlarge": [2.0, "a"]}}
    monkeypatch.setattr("genvalues.planner.prices.table", lambda: {"regions": prices, "dated": "2026-01-01"})
    assert price_per_node_hour("trn1.2xlarge", None) is None
    assert price_per_node_hour("trn1.2xlarge", "us-west-2") == Price(2.0, "a", "us-west-2", "2026-01-01")


@pytest.mark.parametrize(
    ("image", "region"),
    [
        ("123456789012.dkr.ecr.us-west-2.amazonaws.com/llama-lora:0.1.0", "us-west-2"),
        ("123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn/llama-lora:0.1.0", "cn-north-1"),
        ("docker.io/me/llama-lora:1", None),
        (None, None),
    ],
)
def test_the_region_is_the_images(image: str | None, region: str | None) -> None:
    assert region_of(image) == region


# --- live


def product(*dollars: str, usage: str = "BoxUsage:trn1.32xlarge", unit: str = "Hrs") -> str:
    dimensions = {str(number): {"unit": unit, "pricePerUnit": {"USD": each}} for number, each in enumerate(dollars)}
    return json.dumps(
        {"product": {"attributes": {"usagetype": usage}}, "terms": {"OnDemand": {"x": {"priceDimensions": dimensions}}}}
    )


def client(*answers: Any, expected: Any = ANY) -> Any:
    """A boto3 client of the Pricing API with these answers: lists of products, or error codes."""
    made = boto3.client("pricing", region_name="us-east-1", config=Config(signature_version=UNSIGNED))
    stubber = Stubber(made)
    for number, answer in enumerate(answers):
        if isinstance(answer, str):
            stubber.add_client_error("get_products", answer, "not for\nyou")
            continue
        wanted = {"ServiceCode": ANY, "Filters": ANY} if expected is ANY else expected
        if number:
            wanted = {**wanted, "NextToken": "more"}
        more = {"NextToken": "more"} if number + 1 < len(answers) else {}
        stubber.add_response("get_products", {"FormatVersion": "aws_v1", "PriceList": answer, **more}, wanted)
    stubber.activate()
    return made


def filters(**values: str) -> list[dict[str, str]]:
    return [{"Type": "TERM_MATCH", "Field": name, "Value": value} for name, value in values.items()]


def test_ec2_prices_are_linux_on_demand() -> None:
    wanted = {
        "ServiceCode": "AmazonEC2",
        "Filters": filters(
            regionCode="us-west-2",
            instanceType="trn1.32xlarge",
            operatingSystem="Linux",
            tenancy="Shared",
            preInstalledSw="NA",
            capacitystatus="Used",
        ),
    }
    asked = client([product("21.5000000000")], expected=wanted)
    assert live_price("trn1.32xlarge", "us-west-2", asked).dollars == 21.5


def test_hyperpod_prices_are_sagemaker_clusters() -> None:
    wanted = {
        "ServiceCode": "AmazonSageMaker",
        "Filters": filters(regionCode="us-east-1", component="Cluster", instanceType="ml.trn1.32xlarge-Cluster"),
    }
    # Reserved capacity has an on-demand term there, too.
    reserved = product("9.9", usage="USE1-Cluster:ml.trn1.32xlarge-Reserved")
    asked = client([reserved], [product("24.725", usage="USE1-Cluster:ml.trn1.32xlarge")], expected=wanted)
    assert live_price("ml.trn1.32xlarge", "us-east-1", asked).dollars == 24.725


@pytest.mark.parametrize(
    ("products", "said"),
    [
        ([], "has no price for trn1.32xlarge in us-west-2"),
        ([product("0.0000000000")], "has no price"),
        ([product("21.5", unit="Quantity")], "has no price"),
        ([product("21.5"), product("20")], "has 2 prices"),
        ([json.dumps({"product": {"attributes": {}}, "terms": {"Reserved": {}}})], "has no price"),
    ],
)
def test_an_answer_without_exactly_one_price_is_an_error_with_a_fix(products: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as told:
        live_price("trn1.32xlarge", "us-west-2", client(products))
    assert told.value.fix.startswith("Write guards.pricePerNodeHour")


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        (
            "AccessDeniedException",
            UserError,
            "not allowed for these credentials: not for?you. "
            "Allow pricing:GetProducts for them, or use other credentials: AWS_PROFILE=NAME.",
        ),
        ("ExpiredTokenException", UserError, f"the AWS credentials have expired. {aws.LOG_IN_AGAIN}"),
        *(
            (code, UserError, f"AWS rejects these credentials ({code}). {aws.LOG_IN}")
            for code in ("UnrecognizedClientException", "InvalidSignatureException", "IncompleteSignatureException")
        ),
        (
            "InvalidParameterException",
            UserError,
            "AWS answers InvalidParameterException: not for?you. Write guards.pricePerNodeHour.",
        ),
        *(
            (code, Unavailable, f"AWS answers {code}: not for?you. Try again.")
            for code in ("ThrottlingException", "InternalErrorException")
        ),
        (
            "404",
            UserError,
            "the AWS Pricing API has no price for trn1.32xlarge in us-west-2. "
            "Write guards.pricePerNodeHour, or another --region.",
        ),
    ],
)
def test_an_error_of_aws_is_one_line_with_a_fix(code: str, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind) as told:
        live_price("trn1.32xlarge", "us-west-2", client(code))
    assert str(told.value) == f"--live: {said}"


@pytest.mark.parametrize(
    ("error", "kind", "fix"),
    [
        (NoCredentialsError(), UserError, aws.LOG_IN),
        (UnauthorizedSSOTokenError(), UserError, aws.LOG_IN_AGAIN),
        (EndpointConnectionError(endpoint_url="https://api.pricing"), Unavailable, "Check the network."),
    ],
)
def test_no_credentials_and_no_network_are_one_line(error: Exception, kind: type[Exception], fix: str) -> None:
    class Broken:
        def get_paginator(self, name: str) -> Any:
            raise error

    with pytest.raises(kind, match=r"^--live: ") as told:
        live_price("trn1.32xlarge", "us-west-2", Broken())
    assert str(told.value).endswith(fix)


def test_a_missing_profile_is_a_user_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "absent")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    with pytest.raises(UserError, match=r"^--live: The config profile \(absent\) could not be found\. Log in: "):
        live_price("trn1.32xlarge", "us-west-2")
