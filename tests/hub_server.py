"""A Hub on this machine: repositories in memory, behind the HTTP that `huggingface_hub` speaks, with faults on demand.

It answers what the client asks when models are pushed, looked up and loaded: repositories, whole commits, branches,
pull requests, files small (inside the commit) and large (LFS). A commit is there whole or not at all.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import transformers.utils.hub as transformers_hub
import yaml
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import close_session

from tests.hub_repos import Commit, Repo, blob_oid, described, is_large


WRITE_TOKEN = "hf_test"
READ_TOKEN = "hf_read"
OWNER = "me"
SLOW_SECONDS = 0.2

ROOT = Path(__file__).resolve().parents[1]
Answer = tuple[int, Any, dict[str, str]]


@dataclass
class Fault:
    """What happens to the requests number `first` to `last` of those that match.

    `outcome` is a status, `"reset"` (the connection breaks in the middle of the upload), `"lost"` (the request is
    carried out, and the connection breaks before the answer), `"garbled"` (a page for people in the place of JSON), or
    `"slow"` (the answer takes its time).
    """

    method: str
    pattern: str
    outcome: int | str
    first: int = 1
    last: int = 1
    seen: int = 0

    def strikes(self, method: str, path: str) -> bool:
        if method != self.method or not re.search(self.pattern, path):
            return False
        self.seen += 1
        return self.first <= self.seen <= self.last


class Refusal(Exception):
    """An answer other than success, with the error code that the client reads."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.answer: Answer = status, {"error": message}, {name: text for name, text in headers.items() if text}


class HubServer(ThreadingHTTPServer):
    """The server; `repos` and `requests` are for tests to look at, `fail` is the switch for faults."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    def fail(self, method: str, pattern: str, outcome: int | str, first: int = 1, last: int = 1) -> None:
        self.faults.append(Fault(method, pattern, outcome, first, last))

    def count(self, method: str, pattern: str) -> int:
        """How many requests of a kind have come."""
        return sum(1 for one, path in self.requests if one == method and re.search(pattern, path))

    def environment(self, home: object, token: str = WRITE_TOKEN) -> dict[str, str]:
        """What a subprocess needs to take this server for the Hub, beside the environment without `HF_HUB_OFFLINE`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


class Handler(BaseHTTPRequestHandler):
    """One connection; requests find their method by the table of routes at the end."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *arguments: Any) -> None: ...

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, ValueError):  # the client has gone, or a fault has closed the connection
            self.close_connection = True

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        with self.server.lock:
            self.server.requests.append((self.command, url.path))
            strikes = [fault.outcome for fault in self.server.faults if fault.strikes(self.command, url.path)]
        outcome = strikes[0] if strikes else None
        length = int(self.headers.get("Content-Length") or 0)
        if outcome == "reset":
            self.rfile.read(length // 2)
            return self.break_connection()
        self.body = self.rfile.read(length) if length else self.read_chunks()
        if outcome == "slow":
            time.sleep(SLOW_SECONDS)
        if outcome == "garbled":
            return self.send(200, b"<html>", {})
        answer = Refusal(outcome, message="as the test wants it").answer if isinstance(outcome, int) else None
        answer = answer or self.routed(url.path)
        if outcome == "lost":
            return self.break_connection()
        self.send(*answer)

    do_HEAD = do_POST = do_PUT = do_GET

    def read_chunks(self) -> bytes:
        """The body of a request that does not say its length."""
        body = b""
        while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def break_connection(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()

    def routed(self, path: str) -> Answer:
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                with self.server.lock:
                    try:
                        return answer(self, **{name: unquote(text) for name, text in match.groupdict("").items()})
                    except Refusal as refusal:
                        return refusal.answer
        return Refusal(404, message=f"no route for {self.command} {path}").answer

    def send(self, status: int, content: Any, headers: dict[str, str]) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def may_write(self, owner: str) -> None:
        if self.token() not in (WRITE_TOKEN, READ_TOKEN):
            raise Refusal(401, message="Invalid credentials in Authorization header")
        if self.token() == READ_TOKEN or owner != OWNER:
            raise Refusal(403, message=f"You don't have the rights to write to the namespace {owner!r}")

    def repo(self, name: str, write: bool = False) -> Repo:
        if write:
            self.may_write(name.split("/")[0])
        found = self.server.repos.get(name)
        if found is None or (found.private and self.token() != WRITE_TOKEN):
            raise Refusal(404, "RepoNotFound", "Repository not found")
        return found

    def commits(self, name: str, revision: str) -> list[Commit]:
        commits = self.repo(name).commits(revision or "main")
        if not commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commits

    def whoami(self) -> Answer:
        if self.token() not in (WRITE_TOKEN, READ_TOKEN):
            raise Refusal(401, message="Invalid credentials in Authorization header")
        return 200, {"type": "user", "name": OWNER, "orgs": []}, {}

    def validate_yaml(self) -> Answer:
        found = re.match(r"---\n(.*?)\n---", self.json()["content"], re.DOTALL)
        try:
            yaml.safe_load(found[1] if found else "")
        except yaml.YAMLError as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}, {}
        return 200, {"errors": [], "warnings": []}, {}

    def create(self) -> Answer:
        wanted = self.json()
        owner = wanted.get("organization") or OWNER
        self.may_write(owner)
        name = f"{owner}/{wanted['name']}"
        content = {"url": f"{self.server.url}/{name}", "name": name}
        if name in self.server.repos:
            return 409, content | {"error": "You already created this model repo"}, {}
        first = Commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self.server.repos[name] = Repo(wanted.get("visibility") == "private", {"main": [first]})
        return 200, content, {}

    def branch(self, repo: str, branch: str) -> Answer:
        found = self.repo(repo, write=True)
        if branch in found.branches:
            raise Refusal(409, message="Reference already exists")
        found.branches[branch] = list(self.commits(repo, self.json().get("startingPoint", "")))
        return 200, {}, {}

    def info(self, repo: str, revision: str = "") -> Answer:
        last = self.commits(repo, revision)[-1]
        siblings = [{"rfilename": name} for name in sorted(last.files)]
        content = {"id": repo, "modelId": repo, "sha": last.oid, "private": self.repo(repo).private}
        return 200, content | {"siblings": siblings, "tags": []}, {}

    def tree(self, repo: str, revision: str, path: str = "") -> Answer:
        prefix = f"{path}/" if path else ""
        files = {
            name: data for name, data in self.commits(repo, revision)[-1].files.items() if name.startswith(prefix)
        }
        if path and not files:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist on {revision!r}")
        if "true" not in [text.lower() for text in self.query.get("recursive", ["false"])]:
            files = {name: data for name, data in files.items() if "/" not in name.removeprefix(prefix)}
        return 200, [described(name, data) for name, data in sorted(files.items())], {}

    def resolve(self, repo: str, revision: str, path: str) -> Answer:
        last = self.commits(repo, revision)[-1]
        headers = {"X-Repo-Commit": last.oid}
        if path not in last.files:
            status, content, why = Refusal(404, "EntryNotFound", "Entry not found").answer
            return status, content, headers | why
        data = last.files[path]
        return 200, data, headers | {"ETag": f'"{blob_oid(data)}"', "Accept-Ranges": "none"}

    def preupload(self, repo: str, revision: str) -> Answer:
        self.repo(repo, write=True)
        present = self.commits(repo, revision)[-1].files
        files = []
        for wanted in self.json()["files"]:
            name, large = wanted["path"], is_large(wanted["path"], wanted["size"])
            data = present.get(name)
            oid = None if data is None else hashlib.sha256(data).hexdigest() if large else blob_oid(data)
            mode = "lfs" if large else "regular"
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}, {}

    def commit(self, repo: str, revision: str) -> Answer:
        """Carry out all lines, or, if one of them cannot be, none."""
        found, before = self.repo(repo, write=True), self.commits(repo, revision)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit", before[-1].oid) != before[-1].oid:
            raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(before[-1].files)
        for operation in operations:
            self.carry_out(files, operation["key"], operation["value"])
        pull_request = "create_pr" in self.query
        number = sum(1 for name in found.branches if name.startswith("refs/pr/")) + 1
        branch = f"refs/pr/{number}" if pull_request else revision
        found.branches[branch] = [*before, Commit(header["value"]["summary"], files, before[-1].oid)]
        oid = found.branches[branch][-1].oid
        content = {"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid}
        return 200, content | {"pullRequestUrl": f"{self.server.url}/{repo}/discussions/{number}"}, {}

    def carry_out(self, files: dict[str, bytes], kind: str, wanted: dict[str, Any]) -> None:
        name = wanted["path"]
        if kind == "file":
            files[name] = base64.b64decode(wanted["content"])
        elif kind == "lfsFile" and wanted["oid"] in self.server.blobs:
            files[name] = self.server.blobs[wanted["oid"]]
        elif kind == "deletedFile" and name in files:
            del files[name]
        else:
            raise Refusal(400, message=f"{kind} {name} cannot be committed")

    def lfs_batch(self, repo: str) -> Answer:
        self.repo(repo, write=True)
        objects = []
        for wanted in self.json()["objects"]:
            place = {"href": f"{self.server.url}/lfs/{wanted['oid']}"}
            there = wanted["oid"] in self.server.blobs
            actions = {} if there else {"actions": {"upload": place, "verify": place}}
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **actions})
        return 200, {"transfer": "basic", "objects": objects}, {}

    def lfs_put(self, oid: str) -> Answer:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, message="the content is not what its checksum says")
        self.server.blobs[oid] = self.body
        return 200, {}, {}

    def lfs_verify(self, oid: str) -> Answer:
        whole = len(self.server.blobs.get(oid, b"")) == self.json()["size"]
        return (200 if whole else 404), {}, {}


REPO = r"(?P<repo>[^/]+/[^/]+?)"
MODEL = f"/api/models/{REPO}"
REVISION = r"(?P<revision>[^/]+)"
ROUTES: tuple[tuple[str, str, Callable[..., Answer]], ...] = (
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", f"{MODEL}/branch/(?P<branch>[^/]+)", Handler.branch),
    ("GET", MODEL, Handler.info),
    ("GET", f"{MODEL}/revision/{REVISION}", Handler.info),
    ("GET", f"{MODEL}/tree/{REVISION}(?:/(?P<path>.+))?", Handler.tree),
    ("POST", f"{MODEL}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"{MODEL}/commit/{REVISION}", Handler.commit),
    ("HEAD|GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_verify),
)


@contextmanager
def serving() -> Iterator[HubServer]:
    """A server in a thread of this process."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def point_client_at(server: HubServer, patch: pytest.MonkeyPatch, token: str = WRITE_TOKEN) -> None:
    """Make this process's client, which read its environment when it was imported, take the server for the Hub."""
    close_session()
    patch.setenv("HF_TOKEN", token)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "ENDPOINT", server.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(hf_api.api, "endpoint", server.url)
    patch.setattr(transformers_hub, "_hf_api", None, raising=False)


def in_another_process(server: HubServer, home: Path, code: str, *arguments: object) -> str:
    """What a fresh process prints that takes the server for the Hub, with a cache of its own."""
    hidden = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_MODULES_CACHE", "HF_HUB_CACHE")
    inherited = {name: text for name, text in os.environ.items() if name not in hidden}
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=home,
        env={**inherited, **server.environment(home), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,  # a prompt for trust would fail
        timeout=200,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout
