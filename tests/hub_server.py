# SPDX-License-Identifier: Apache-2.0
"""
A stand-in for the Hugging Face Hub on the loopback interface: repositories of models in memory, with what
`huggingface_hub` asks for when it creates, uploads to, lists and downloads from one.
"""

import base64
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


TOKEN = "hf_dummy"
LARGE_FILES = (".safetensors", ".bin", ".pt")


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def identity(path: str, content: bytes) -> str:
    """What the Hub compares to tell whether a file has changed."""
    return sha256(content) if path.endswith(LARGE_FILES) else git_oid(content)


@dataclass
class Repository:
    """Files by path, at every commit; the last commit is `main`."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})

    @property
    def head(self) -> str:
        return next(reversed(self.commits))

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def commit(self, files: dict[str, bytes], message: str) -> str:
        listing = "".join(f"{path} {git_oid(content)}\n" for path, content in sorted(files.items()))
        oid = hashlib.sha1(f"{self.head}\n{message}\n{listing}".encode()).hexdigest()
        self.commits[oid] = files
        return oid


class HubError(Exception):
    def __init__(self, status: HTTPStatus, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class HubRequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Hub"

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self):
        body = self.read_body()
        url = urlsplit(self.path)
        with self.server.lock:
            self.server.requests.append(f"{self.command} {url.path}")
            try:
                for method, pattern, route in ROUTES:
                    match = re.fullmatch(pattern, url.path)
                    if match and self.command in method.split():
                        # No token is sent to the storage of large files, which lies behind the Hub.
                        if method == "POST" and self.headers["Authorization"] != f"Bearer {TOKEN}":
                            raise HubError(HTTPStatus.UNAUTHORIZED, "", "Invalid credentials")
                        arguments = {name: value and unquote(value) for name, value in match.groupdict().items()}
                        route(self, body, **arguments)
                        return
                raise HubError(HTTPStatus.NOT_FOUND, "", f"The stand-in has no {self.command} {url.path}")
            except HubError as error:
                self.send(
                    json.dumps({"error": str(error)}).encode(),
                    error.status,
                    {"X-Error-Code": error.code, "X-Error-Message": str(error)},
                )

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, content: bytes, status: HTTPStatus = HTTPStatus.OK, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value: Any):
        self.send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def log_message(self, *args):
        pass

    def repository(self, name: str) -> Repository:
        if name not in self.server.repositories:
            raise HubError(HTTPStatus.NOT_FOUND, "RepoNotFound", f"Repository {name} not found")
        return self.server.repositories[name]

    def revision(self, name: str, revision: str | None) -> tuple[str, dict[str, bytes]]:
        repository = self.repository(name)
        oid = repository.head if revision in (None, "main") else revision
        if oid not in repository.commits:
            raise HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, repository.commits[oid]

    def create_repository(self, body: bytes):
        request = json.loads(body)
        name = f"{request.get('organization') or 'me'}/{request['name']}"
        url = f"{self.server.url}/{name}"
        if name in self.server.repositories:
            self.send(json.dumps({"error": "You already created this repo", "url": url}).encode(), HTTPStatus.CONFLICT)
            return
        self.server.repositories[name] = Repository()
        self.send_json({"url": url, "name": name})

    def validate_card(self, body: bytes):
        self.send_json({"errors": [], "warnings": []})

    def upload_modes(self, body: bytes, name: str, revision: str):
        _, files = self.revision(name, revision)
        self.send_json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LARGE_FILES) else "regular",
                        "shouldIgnore": False,
                        "oid": identity(file["path"], files[file["path"]]) if file["path"] in files else None,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        )

    def large_file_actions(self, body: bytes, name: str):
        objects = []
        for requested in json.loads(body)["objects"]:
            objects.append({"oid": requested["oid"], "size": requested["size"]})
            if requested["oid"] not in self.server.large_files:
                objects[-1]["actions"] = {"upload": {"href": f"{self.server.url}/large-files/{requested['oid']}"}}
        self.send_json({"transfer": "basic", "objects": objects})

    def upload_large_file(self, body: bytes, oid: str):
        if sha256(body) != oid:
            raise HubError(HTTPStatus.BAD_REQUEST, "", f"These bytes are not those of {oid}")
        self.server.large_files[oid] = body
        self.send(b"")

    def commit(self, body: bytes, name: str, revision: str):
        repository = self.repository(name)
        files, message = dict(repository.files), ""
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.server.large_files[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
                case key:
                    raise HubError(HTTPStatus.BAD_REQUEST, "", f"The stand-in knows no operation {key}")
        oid = repository.commit(files, message)
        self.send_json(
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{self.server.url}/{name}/commit/{oid}",
                "hookOutput": "",
            }
        )

    def model_info(self, body: bytes, name: str, revision: str | None = None):
        oid, files = self.revision(name, revision)
        siblings = []
        for path, content in files.items():
            sibling = {"rfilename": path, "size": len(content), "blobId": git_oid(content)}
            if path.endswith(LARGE_FILES):
                sibling["lfs"] = {"size": len(content), "sha256": sha256(content), "pointerSize": 134}
            siblings.append(sibling)
        self.send_json(
            {
                "id": name,
                "modelId": name,
                "sha": oid,
                "private": False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": siblings,
            }
        )

    def tree(self, body: bytes, name: str, revision: str, folder: str | None = None):
        _, files = self.revision(name, revision)
        entries = []
        for path, content in files.items():
            if folder and not path.startswith(f"{folder}/"):
                continue
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
            if path.endswith(LARGE_FILES):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self.send_json(entries)

    def download(self, body: bytes, name: str, revision: str, path: str):
        oid, files = self.revision(name, revision)
        if path not in files:
            raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound", f"Entry not found: {path}")
        content = files[path]
        etag = identity(path, content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if path.endswith(LARGE_FILES):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            self.send(content[start : end + 1], HTTPStatus.PARTIAL_CONTENT, headers)
        else:
            self.send(content, headers=headers)


NAME = r"(?P<name>[^/]+/[^/]+)"
ROUTES = [
    ("POST", r"/api/repos/create", HubRequestHandler.create_repository),
    ("POST", r"/api/validate-yaml", HubRequestHandler.validate_card),
    ("POST", rf"/api/models/{NAME}/preupload/(?P<revision>[^/]+)", HubRequestHandler.upload_modes),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", HubRequestHandler.large_file_actions),
    ("PUT", r"/large-files/(?P<oid>[0-9a-f]{64})", HubRequestHandler.upload_large_file),
    ("POST", rf"/api/models/{NAME}/commit/(?P<revision>[^/]+)", HubRequestHandler.commit),
    ("GET", rf"/api/models/{NAME}(/revision/(?P<revision>[^/]+))?", HubRequestHandler.model_info),
    ("GET", rf"/api/models/{NAME}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", HubRequestHandler.tree),
    ("GET HEAD", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", HubRequestHandler.download),
]


class Hub(ThreadingHTTPServer):
    """
    The server. `repositories` are those that were created, by name; `requests` is what was asked for, in order.
    """

    daemon_threads = True

    def __init__(self, make_home: Callable[[], Path]):
        super().__init__(("127.0.0.1", 0), HubRequestHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.make_home = make_home
        self.lock = Lock()
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []

    def environment(self) -> dict[str, str]:
        """Variables of a process that takes this server for the Hub, with nothing cached."""
        return {
            **os.environ,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.make_home()),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def call(self, function: Callable, *arguments: Any, **environment: str) -> Any:
        """
        What a function at the top of a test file returns in a process of its own that takes this server for the Hub:
        `huggingface_hub` reads its settings when it is imported. Arguments and result travel as JSON; `environment`
        are further variables.
        """
        file = Path(inspect.getfile(function))
        program = (
            "import json, sys; sys.path[:0] = sys.argv[1:3]; module = __import__(sys.argv[3]); "
            "result = getattr(module, sys.argv[4])(*json.loads(sys.argv[5])); print(); print(json.dumps(result))"
        )
        folders = [str(file.parent), str(Path(__file__).parent)]
        command = [sys.executable, "-c", program, *folders, file.stem, function.__name__]
        run = subprocess.run(
            [*command, json.dumps(arguments)],
            env={**self.environment(), **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, f"{function.__name__}{arguments} failed:\n{run.stdout}\n{run.stderr}"
        return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Hub:
    """A Hub of its own for each test file, empty at first."""
    with Hub(lambda: tmp_path_factory.mktemp("hf_home")) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
