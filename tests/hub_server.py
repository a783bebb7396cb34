"""A stand-in for the Hugging Face Hub on this machine: as much of it as the real client calls to publish and to load.

A fault can be laid on any call: a status, a connection that breaks off, or silence.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from huggingface_hub import ModelCard

TOKEN = "hf_right"
READER = "hf_reader"  # a token without the right to write


class Repository:
    """Commits are numbered by their content; a branch is the name of one."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.gated = False
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.messages: list[str] = []
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, branch: str, files: Mapping[str, bytes | None], message: str = "") -> str:
        """Commits changed files; None: removed ones."""
        self.messages.append(message)
        both = self.commits.get(self.branches.get(branch, ""), {}) | files
        whole = {name: content for name, content in both.items() if content is not None}
        oid = hashlib.sha1(repr((len(self.commits), sorted(whole.items()))).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = whole, oid
        return oid


class Call(NamedTuple):
    method: str
    path: str
    size: int  # bytes of its body


class Hub(ThreadingHTTPServer):
    """Attributes:
    repositories: by OWNER/NAME.
    objects: large files by sha256; they stay whether they are committed or not.
    calls: all that came.
    faults: by a pattern of `METHOD /path`: a status, `break` or `silence`, and how many times more.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.calls: list[Call] = []
        self.faults: dict[str, tuple[int | str, int]] = {}
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def sent(self) -> int:
        """Bytes of large files that came."""
        return sum(call.size for call in self.calls if call.method == "PUT")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error of ours."""


@contextmanager
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()


class Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: else the body waits 40 ms for the delayed ACK of the headers
    server: Hub

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        call = Call(self.command, path, len(body))
        for pattern, (fault, times) in self.server.faults.items():
            if times and re.search(pattern, f"{call.method} {path}"):
                self.server.faults[pattern] = fault, times - 1
                if fault == "silence":
                    self.server.closing.wait()
                if isinstance(fault, str):
                    self.close_connection = True
                    return
                self._send(fault, json.dumps({"error": "laid by the test"}).encode())
                return
        self.server.calls.append(call)
        try:
            for method, pattern, action in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and call.method in method:
                    action(self, body, *match.groups())
                    return
            raise Refusal(404, "", f"no such address: {path}")
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            self._send(refusal.status, json.dumps({"error": refusal.message}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, document: object, status: int = 200) -> None:
        self._send(status, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _writer(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token != TOKEN:
            raise Refusal(403 if token == READER else 401, "", "you may not write here" if token else "")

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """A revision's commit and files, for those who may see them."""
        repository = self.server.repositories.get(name)
        known = (self.headers.get("Authorization") or "").removeprefix("Bearer ") in (TOKEN, READER)
        if repository is None or (repository.private and not known):
            raise Refusal(404 if known else 401, "RepoNotFound", "Repository not found")
        if repository.gated:
            raise Refusal(403, "GatedRepo", f"Access to model {name} is restricted")
        oid = repository.branches.get(revision, revision)
        if oid not in repository.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, repository.commits[oid]

    def log_message(self, *arguments: object) -> None:
        pass

    # What the client calls, in the order in which it does.

    def create(self, body: bytes) -> None:
        self._writer()
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.repositories:
            self._json({"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}, 409)
            return
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.repositories[name] = Repository(bool(private))
        self._json({"url": f"{self.server.url}/{name}"})

    def whoami(self, body: bytes) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in (TOKEN, READER):
            raise Refusal(401)
        role = {"accessToken": {"role": "write" if token == TOKEN else "read"}}
        self._json({"type": "user", "name": "me", "orgs": [{"name": "lab"}], "auth": role})

    def may_write(self, body: bytes, name: str) -> None:
        self._files(name, "main")
        self._writer()
        self._json({})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        self._writer()
        oid, _ = self._files(name, "main")
        branches = self.server.repositories[name].branches
        self._json({}, 409 if branch in branches else 200)
        branches.setdefault(branch, oid)

    def info(self, body: bytes, name: str, revision: str | None) -> None:
        oid, files = self._files(name, revision or "main")
        detailed = "blobs" in urlsplit(self.path).query
        private = self.server.repositories[name].private
        siblings: list[dict[str, Any]] = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
        for file in siblings:
            if detailed and file["rfilename"].endswith(".safetensors"):
                digest = _oid(file["rfilename"], files[file["rfilename"]])
                file["lfs"] = {"sha256": digest, "size": file["size"], "pointerSize": 130}
        self._json({"id": name, "sha": oid, "private": private, "tags": [], "downloads": 0, "siblings": siblings})

    def validate(self, body: bytes) -> None:
        data = ModelCard(json.loads(body)["content"]).data
        wrong = [] if data.get("license") else [{"message": '"license" is missing'}]
        self._json({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        self._writer()
        _, files = self._files(name, revision)
        answers = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            large = path.endswith(".safetensors")
            oid = _oid(path, files[path]) if path in files else None
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def batch(self, body: bytes, name: str) -> None:
        self._writer()
        answers = []
        for asked in json.loads(body)["objects"]:
            upload = {"href": f"{self.server.url}/objects/{asked['oid']}"}
            verify = {"href": f"{self.server.url}/objects/{asked['oid']}/verify"}
            new = asked["oid"] not in self.server.objects
            answers.append(asked | ({"actions": {"upload": upload, "verify": verify}} if new else {}))
        self._json({"transfer": "basic", "objects": answers})

    def put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "", "the checksum is wrong")
        self.server.objects[oid] = body
        self._send(200, b"")

    def verify(self, body: bytes, oid: str) -> None:
        if len(self.server.objects.get(oid, b"")) != json.loads(body)["size"]:
            raise Refusal(404, "", "no such object")
        self._send(200, b"")

    def commit(self, body: bytes, name: str, branch: str) -> None:
        self._writer()
        head, _ = self._files(name, branch)
        files: dict[str, bytes | None] = {}
        message = ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            if line["key"] == "header" and value.get("parentCommit", head) != head:
                raise Refusal(412, "", "A commit has happened since")
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "deletedFile":
                files[value["path"]] = None
            if line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        oid = self.server.repositories[name].commit(branch, files, message)
        self._json({"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        _, files = self._files(name, revision)
        self._json([{"type": "file", "path": p, "size": len(c), "oid": _oid(p, c)} for p, c in files.items()])

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        oid, files = self._files(name, revision)
        if path not in files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        self._send(200, files[path], {"X-Repo-Commit": oid, "ETag": f'"{_oid(path, files[path])}"'})


def _oid(path: str, content: bytes) -> str:
    """What git or LFS calls a file."""
    if path.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ("POST", "/api/repos/create", Handler.create),
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("GET", f"/api/models/{NAME}/auth-check/write", Handler.may_write),
    ("POST", f"/api/models/{NAME}/branch/(.+)", Handler.branch),
    ("GET", f"/api/models/{NAME}(?:/revision/(.+))?", Handler.info),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/objects/([0-9a-f]{64})", Handler.put),
    ("POST", "/objects/([0-9a-f]{64})/verify", Handler.verify),
    ("POST", f"/api/models/{NAME}/commit/(.+)", Handler.commit),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", Handler.tree),
    ("GET, HEAD", f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
)
