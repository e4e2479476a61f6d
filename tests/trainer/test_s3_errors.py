"""Faults of S3, of its endpoint and of boto3's settings: one message each, for the user (2) or for a retry (1)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from genvalues.common.errors import Unavailable, UserError
from llama_lora.config import Dataset
from llama_lora.data import resolve
from llama_lora.data.dataset_readers import read_rows
from llama_lora.data.resolve import ResolvedSources, Source
from llama_lora.data.rows import BadRows
from llama_lora.uploads import File, manifest_of, s3
from trainer.conftest import Run
from trainer.fake_s3 import CUT, FakeS3, Stored

KEY, PREFIX = "s3://bucket/rows.jsonl", "s3://bucket/data/"
DEAD = {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}  # the discard port: nothing listens there
ROWS = b'{"q": "1", "a": "2"}\n' * 9


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    fake = FakeS3()
    for name, value in fake.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)  # with the credentials of another test
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


def look_up(source: str) -> None:
    resolve._look_up_s3(source, "dataset.source")


def publish(folder: Path) -> None:
    path = folder / "README.md"
    path.write_bytes(b"# card\n")
    files = [File("README.md", path, 7, hashlib.sha256(b"# card\n").hexdigest(), "merge")]
    s3.upload("s3://bucket/runs/one", "one", files, manifest_of("one", "f1", files), folder / "begun.json")


def one_line_of(error: pytest.ExceptionInfo[Exception]) -> str:
    said = str(error.value)
    assert "\n" not in said and "secret" not in said, said
    return said


@pytest.mark.parametrize("place", ["read", "publish"])
@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "InvalidAccessKeyId", "Check the AWS credentials of the"),
        (403, "SignatureDoesNotMatch", "Check the AWS credentials of the"),
        (400, "ExpiredToken", "Renew the credentials"),
        (400, "InvalidToken", "Renew the credentials"),
        (403, "RequestTimeTooSkewed", "clock"),
        (400, "BadRequest", "AWS_REGION"),
        (403, "AccessDenied", "s3:GetObject"),
        (301, "PermanentRedirect", "AWS_REGION"),
        (503, "SlowDown", None),
        (500, "InternalError", None),
        (400, "RequestTimeout", None),
        (*CUT, None),
    ],
)
def test_what_s3_refuses_is_for_the_user_and_what_passes_is_for_a_retry(
    bucket: FakeS3, tmp_path: Path, place: str, status: int, code: str, words: str | None
) -> None:
    bucket.fault = lambda *_: (status, code)
    with pytest.raises(UserError if words else Unavailable) as error:
        look_up(PREFIX) if place == "read" else publish(tmp_path)
    assert (words or "S3") in one_line_of(error)
    if place == "read" and status:  # HEAD, whose answer has no code
        with pytest.raises(UserError if words else (UserError, Unavailable)) as error:
            look_up(KEY)
        assert isinstance(error.value, Unavailable) == (status >= 500)
        one_line_of(error)


@pytest.mark.parametrize("place", [KEY, PREFIX, "publish"])
@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"AWS_ENDPOINT_URL_S3": "garbage"}, "Check AWS_ENDPOINT_URL_S3."),
        ({"AWS_ENDPOINT_URL_S3": "http://user:secret@127.0.0.1:abc"}, "AWS_ENDPOINT_URL_S3."),
        ({"AWS_DEFAULT_REGION": "bad region!"}, "Check AWS_DEFAULT_REGION."),
        ({"AWS_PROFILE": "nope"}, "Check AWS_PROFILE."),
        ({"AWS_CONFIG_FILE": "{bad}"}, "Check AWS_CONFIG_FILE."),
        ({"AWS_SHARED_CREDENTIALS_FILE": "{bad}", "AWS_ACCESS_KEY_ID": ""}, "Check AWS_SHARED_CREDENTIALS_FILE."),
        ({"AWS_DEFAULTS_MODE": "foo"}, "Check AWS_DEFAULTS_MODE."),
        ({"AWS_STS_REGIONAL_ENDPOINTS": "foo"}, "Check AWS_STS_REGIONAL_ENDPOINTS."),
        ({"AWS_REQUEST_CHECKSUM_CALCULATION": "foo"}, "Check AWS_REQUEST_CHECKSUM_CALCULATION."),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "missing: AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "a\nsecret"}, "Check AWS_ACCESS_KEY_ID"),
        ({"HTTP_PROXY": "::secret::", "NO_PROXY": "x", "no_proxy": "x"}, "Check HTTP_PROXY."),
        (
            {"AWS_ROLE_ARN": "x", "AWS_WEB_IDENTITY_TOKEN_FILE": "/none", "AWS_ACCESS_KEY_ID": "", "AWS_PROFILE": ""},
            "AWS_WEB_IDENTITY_TOKEN_FILE: /none cannot be read",
        ),
    ],
)
def test_a_setting_of_boto3_that_is_not_valid_is_named(
    bucket: FakeS3,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    place: str,
    environment: dict[str, str],
    words: str,
) -> None:
    (tmp_path / "bad").write_text("[profile x\nfoo")
    for name, value in environment.items():
        text = value.format(bad=tmp_path / "bad")
        monkeypatch.setenv(name, text) if text else monkeypatch.delenv(name, raising=False)
    if not os.environ.get("AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError) as error:
        publish(tmp_path) if place == "publish" else look_up(place)
    assert words in one_line_of(error)
    assert error.value.where == ("publish.s3.uri" if place == "publish" else "dataset.source")


@pytest.mark.parametrize("place", [KEY, PREFIX, "publish"])
@pytest.mark.parametrize("environment", [DEAD, {"HTTP_PROXY": "http://user:secret@127.0.0.1:9", "NO_PROXY": "x"}])
def test_an_endpoint_or_a_proxy_that_does_not_answer_is_for_a_retry(
    bucket: FakeS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Unavailable, match="does not answer") as error:
        publish(tmp_path) if place == "publish" else look_up(place)
    one_line_of(error)


@pytest.mark.parametrize("length", [len(ROWS) + 1, None])
def test_a_download_that_is_cut_off_is_for_a_retry(
    bucket: FakeS3, monkeypatch: pytest.MonkeyPatch, length: int | None
) -> None:
    framing = {"Content-Length": str(length)} if length else {"Transfer-Encoding": "chunked"}
    answer = (200, ROWS if length else b"%x\r\n" % len(ROWS) + ROWS, {"ETag": '"x"', "Connection": "close", **framing})
    monkeypatch.setattr(bucket, "serve", lambda *_: answer)
    dataset = Dataset.model_validate({"source": KEY, "format": "text"})
    pinned = Source("rows", "x")
    with pytest.raises(Unavailable, match="S3 does not answer") as error:
        list(read_rows(dataset, ResolvedSources(pinned, pinned), BadRows()))
    one_line_of(error)


def test_an_endpoint_that_is_not_s3_is_named(bucket: FakeS3, new_run: Callable[..., Run]) -> None:
    """Its answers have no ETag."""
    bucket.objects["rows.jsonl"] = Stored(b"", "", {})
    run = new_run()
    run.config["dataset"]["source"] = KEY
    said = run("tokenize", status=2)
    assert said.startswith("dataset.source: boto3: ") and "has no ETag" in said and said.count("\n") == 1
