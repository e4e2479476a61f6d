"""An S3 server for tests: objects in a dict, uploads in parts, and the checksums that S3 verifies."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit
from xml.etree import ElementTree

CUT = (0, "")  # a fault: the connection ends without an answer


class Stored(NamedTuple):
    content: bytes
    checksum: str
    metadata: dict[str, str]


class FakeS3:
    """One bucket, ``bucket``. ``fault`` may answer a request (method, key, query) with a status and a code."""

    def __init__(self) -> None:
        self.objects: dict[str, Stored] = {}
        self.uploads: dict[str, tuple[str, dict[str, str], dict[int, Stored]]] = {}  # by id: key, metadata, parts
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.fault: Callable[[str, str, dict[str, str]], tuple[int, str] | None] = lambda *_: None
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                url = urlsplit(self.path)
                key = url.path.removeprefix("/bucket/")
                query = dict(parse_qsl(url.query, keep_blank_values=True))
                fake.requests.append((self.command, key, query))
                if fault := fake.fault(self.command, key, query):
                    if fault == CUT:
                        self.close_connection = True
                        return
                    self.reply(fault[0], error(fault[1]))
                    return
                self.reply(*fake.serve(self.command, key, query, body, {k.lower(): v for k, v in self.headers.items()}))

            def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                if "Content-Length" not in (headers or {}):
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{self.server.server_port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def sent(self, method: str) -> list[str]:
        return [key for sent, key, _ in self.requests if sent == method]

    def serve(
        self, method: str, key: str, query: dict[str, str], body: bytes, headers: dict[str, str]
    ) -> tuple[int, bytes, dict[str, str]]:
        metadata = {n.removeprefix("x-amz-meta-"): v for n, v in headers.items() if n.startswith("x-amz-meta-")}
        checksum = headers.get("x-amz-checksum-sha256", "")
        if method == "PUT" and checksum != base64.b64encode(hashlib.sha256(body).digest()).decode():
            return 400, error("BadDigest"), {}
        if "uploadId" in query:
            return self.in_parts(method, query, body, checksum)
        if method == "POST" and "uploads" in query:
            assert headers["x-amz-checksum-algorithm"] == "SHA256"
            upload = f"upload-{len(self.requests)}"
            self.uploads[upload] = (key, metadata, {})
            text = f"<R><Bucket>bucket</Bucket><Key>{key}</Key><UploadId>{upload}</UploadId></R>"
            return 200, text.encode(), {}
        if method == "PUT":
            self.objects[key] = Stored(body, checksum, metadata)
            return 200, b"", {"ETag": '"x"', "x-amz-checksum-sha256": checksum}
        if key not in self.objects:
            return 404, error("NoSuchKey"), {}
        stored = self.objects[key]
        if method == "DELETE":
            del self.objects[key]
            return 204, b"", {}
        named = {f"x-amz-meta-{name}": value for name, value in stored.metadata.items()}
        found = {**named, "x-amz-checksum-sha256": stored.checksum, "Content-Length": str(len(stored.content))}
        return 200, stored.content, found

    def in_parts(
        self, method: str, query: dict[str, str], body: bytes, checksum: str
    ) -> tuple[int, bytes, dict[str, str]]:
        if query["uploadId"] not in self.uploads:
            return 404, error("NoSuchUpload"), {}
        key, metadata, parts = self.uploads[query["uploadId"]]
        if method == "PUT":
            parts[int(query["partNumber"])] = Stored(body, checksum, {})
            return 200, b"", {"ETag": f'"{query["partNumber"]}"', "x-amz-checksum-sha256": checksum}
        if method == "DELETE":
            del self.uploads[query["uploadId"]]
            return 204, b"", {}
        if method == "GET":
            listed = "".join(
                f"<Part><PartNumber>{n}</PartNumber><ETag>x</ETag><ChecksumSHA256>{p.checksum}</ChecksumSHA256></Part>"
                for n, p in sorted(parts.items())
            )
            return 200, f"<R><IsTruncated>false</IsTruncated>{listed}</R>".encode(), {}
        wanted = [
            (int(text(part, "PartNumber")), text(part, "ChecksumSHA256"))
            for part in ElementTree.fromstring(body)
            if part.tag.endswith("Part")
        ]
        if wanted != [(number, parts[number].checksum) for number in range(1, len(parts) + 1)]:
            return 400, error("InvalidPart"), {}
        ordered = [parts[number] for number, _ in wanted]
        of_parts = hashlib.sha256(b"".join(base64.b64decode(part.checksum) for part in ordered)).digest()
        whole = f"{base64.b64encode(of_parts).decode()}-{len(ordered)}"
        self.objects[key] = Stored(b"".join(part.content for part in ordered), whole, metadata)
        del self.uploads[query["uploadId"]]
        return 200, f"<R><ETag>x</ETag><ChecksumSHA256>{whole}</ChecksumSHA256></R>".encode(), {}


def text(part: ElementTree.Element, name: str) -> str:
    return next(str(each.text) for each in part if each.tag.endswith(name))


def error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
