"""A local stand-in for the Hugging Face hub: what huggingface_hub asks for when it pushes, over real HTTP.

Large files (those named `*.safetensors`) travel as LFS objects, as on the hub: an object that arrived is not asked
for again, also if the commit that needs it never came. Only the token `hf_write` may write.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

TOKEN = "hf_write"
READ_ONLY = "hf_read"


class HubServer:
    """Holds repositories in memory; stops to answer uploads after `hold_after` objects, until `release` is set."""

    def __init__(self, hold_after: int | None = None) -> None:
        self.repos: dict[str, dict[str, dict[str, Any]]] = {}  # entries of the tree by path
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.received: Counter[str] = Counter()  # LFS objects by oid, and small files by path
        self.commits: list[list[str]] = []
        self.hold_after, self.holding, self.release = hold_after, threading.Event(), threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                data = self.rfile.read(int(self.headers.get("content-length", 0)))
                status, value = hub.answer(self.command, self.path, self.headers.get("authorization", ""), data)
                body = b"" if value is None else json.dumps(value).encode()
                self.send_response(status)
                if status >= 400 and isinstance(value, dict):
                    self.send_header("X-Error-Message", str(value.get("error")))
                    if status == 404:
                        self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", str(len(body)))
                with suppress(BrokenPipeError):  # a client that was killed
                    self.end_headers()
                    self.wfile.write(body)

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, args=[0.05], daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method: str, target: str, authorization: str, data: bytes) -> tuple[int, Any]:
        """Status and JSON of the answer to one request."""
        path = target.partition("?")[0].strip("/")
        parts = path.split("/")
        if parts[0] == "objects":
            return self.upload(parts[1], data)
        if authorization.removeprefix("Bearer ") not in (TOKEN, READ_ONLY):
            return 401, {"error": "Invalid credentials in Authorization header"}
        writes = method == "POST" and path != "api/validate-yaml"
        if writes and authorization != f"Bearer {TOKEN}":
            return 403, {"error": "You don't have the rights to write here"}
        if path == "api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "api/repos/create":
            return self.create(json.loads(data))
        repo = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2]).removesuffix(".git")
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}
        if path.endswith("info/lfs/objects/batch"):
            return 200, self.batch(json.loads(data)["objects"])
        if method == "GET" and parts[4:5] == ["tree"]:
            return 200, list(self.repos[repo].values())
        if method == "GET":
            return 200, {"id": repo, "private": self.private[repo], "sha": "0" * 40, "siblings": []}
        if parts[4] == "preupload":
            return 200, {"files": [self.mode(repo, file["path"]) for file in json.loads(data)["files"]]}
        assert parts[4] == "commit", target
        return self.commit(repo, [json.loads(line) for line in data.splitlines()])

    def create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{repo}"}
        self.repos[repo], self.private[repo] = {}, asked["visibility"] == "private"
        return 200, {"url": f"{self.url}/{repo}"}

    def mode(self, repo: str, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        return {
            "path": path,
            "uploadMode": mode,
            "shouldIgnore": False,
            "oid": self.repos[repo].get(path, {}).get("oid"),
        }

    def batch(self, objects: list[dict[str, Any]]) -> dict[str, Any]:
        upload = {o["oid"]: {"actions": {"upload": {"href": f"{self.url}/objects/{o['oid']}"}}} for o in objects}
        return {
            "transfer": "basic",
            "objects": [{**o, **({} if o["oid"] in self.objects else upload[o["oid"]])} for o in objects],
        }

    def upload(self, oid: str, data: bytes) -> tuple[int, Any]:
        if self.hold_after is not None and len(self.objects) >= self.hold_after and not self.release.is_set():
            self.holding.set()
            self.release.wait(60)
            return 503, None  # its sender has gone
        assert hashlib.sha256(data).hexdigest() == oid
        self.objects[oid] = data
        self.received[oid] += 1
        return 200, None

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        for line in lines[1:]:
            value = line["value"]
            entry = {"type": "file", "path": value["path"]}
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                self.received[value["path"]] += 1
                oid = hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
                entry |= {"size": len(content), "oid": oid, "text": content.decode()}
            else:
                assert value["oid"] in self.objects, "committed before it was uploaded"
                lfs = {"oid": value["oid"], "size": value["size"], "pointerSize": 130}
                entry |= {"size": value["size"], "oid": "0" * 40, "lfs": lfs}
            self.repos[repo][value["path"]] = entry
        self.commits.append([line["value"]["path"] for line in lines[1:]])
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/0", "commitOid": "0" * 40}
