"""A Hub for tests that accepts uploads: repositories, large files by LFS, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

CUT = 0  # a fault: the connection ends without an answer


class FakeHub:
    """``fault`` may answer a request (method, path) with a status."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.commits = 0
        self.requests: list[tuple[str, str]] = []
        self.fault: Callable[[str, str], int | None] = lambda *_: None
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                pieces = b""
                while size := int(self.rfile.readline(), 16):
                    pieces += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return pieces

            def answer(self) -> None:
                path = unquote(urlsplit(self.path).path)
                body = self.body()
                fake.requests.append((self.command, path))
                fault = fake.fault(self.command, path)
                if fault == CUT:
                    self.close_connection = True
                    return
                status, headers, content = (fault, {}, b"{}") if fault else fake.serve(self.command, path, body)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test"}

    def sent(self, method: str, part: str) -> list[str]:
        return [path for sent, path in self.requests if sent == method and part in path]

    def serve(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.repositories:
                return 409, {}, as_json({"url": f"{self.url}/{name}"})
            self.repositories[name] = {".gitattributes": b"*.safetensors filter=lfs\n"}
            self.private[name] = asked.get("private") or asked.get("visibility") == "private"
            return 200, {}, as_json({"url": f"{self.url}/{name}"})
        if path == "/api/validate-yaml":
            return 200, {}, as_json({"errors": [], "warnings": []})
        if path.startswith("/large/"):
            oid = path.removeprefix("/large/")
            if hashlib.sha256(body).hexdigest() != oid:
                return 400, {}, b""
            self.large[oid] = body
            return 200, {}, b""
        if re.fullmatch(r"/(\w+/\w+)\.git/info/lfs/objects/batch", path):
            asked = json.loads(body)
            objects = [
                {"oid": each["oid"], "size": each["size"]}
                | ({} if each["oid"] in self.large else {"actions": {"upload": self.action(each["oid"])}})
                for each in asked["objects"]
            ]
            return 200, {}, as_json({"objects": objects, "transfer": "basic"})
        found = re.match(r"/(?:api/models/)?(\w+/\w+)(?:/(\w+))?(?:/(\w+))?(?:/(.*))?$", path)
        assert found, path
        name, verb, _, file = found.groups()
        if name not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        files = self.repositories[name]
        if verb == "preupload":
            asked = json.loads(body)["files"]
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for each in asked
            ]
            return 200, {}, as_json({"files": modes})
        if verb == "commit":
            return self.commit(name, body)
        if verb == "resolve":
            headers = {"X-Repo-Commit": self.sha, "ETag": f'"{hashlib.sha1(files[file]).hexdigest()}"'}
            return 200, headers, files[file]
        listed = [self.sibling(each, content) for each, content in files.items()]
        described = {"id": name, "sha": self.sha, "private": self.private[name], "siblings": listed}
        return 200, {"Content-Type": "application/json"}, as_json(described)

    @property
    def sha(self) -> str:
        return f"{self.commits:040x}"

    def action(self, oid: str) -> dict[str, Any]:
        return {"href": f"{self.url}/large/{oid}"}

    def sibling(self, name: str, content: bytes) -> dict[str, Any]:
        found: dict[str, Any] = {"rfilename": name, "size": len(content)}
        if name.endswith(".safetensors"):
            return found | {
                "lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
            }
        return found | {"blobId": hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()}

    def commit(self, name: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        header, *changes = (json.loads(line) for line in body.splitlines() if line.strip())
        if header["value"].get("parentCommit", self.sha) != self.sha:
            return 412, {}, b"{}"
        files = dict(self.repositories[name])
        for change in changes:
            value = change["value"]
            if change["key"] == "deletedFile":
                del files[value["path"]]
            elif change["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        self.repositories[name] = files
        self.commits += 1
        return 200, {}, as_json({"commitUrl": f"{self.url}/{name}/commit/{self.sha}", "commitOid": self.sha})


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()
