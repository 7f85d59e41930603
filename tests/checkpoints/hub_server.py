"""A small Hugging Face hub on this machine: the requests that huggingface_hub 2.4 makes to fetch a repository, to make
one, and to upload a folder, without Xet. What it holds is in memory."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_thisIsASecretOfTheTests"
Files = dict[str, bytes]


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)  # by their hashes, the oldest first
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Files, branch: str = "main", message: str = "") -> str:
        content = f"{len(self.commits)} {sorted(files)}".encode()
        sha = hashlib.sha1(content).hexdigest()
        self.commits[sha], self.branches[branch] = dict(files), sha
        self.messages.append(message)
        return sha

    def at(self, revision: str) -> tuple[str, Files] | None:
        sha = self.branches.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


@dataclass
class Hub:
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)  # uploaded large files, by their SHA-256
    requests: list[tuple[str, str, bool]] = field(default_factory=list)  # method, path, whether with a token
    answer: int = 0  # to every request, where not 0
    large: tuple[str, ...] = (".safetensors", ".model")
    said: str = "not today"
    port: int = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage(self) -> str:
        """Where large files lie: another host, to which no token may be sent."""
        return f"http://localhost:{self.port}/large"

    def add(self, name: str, files: Files, **fields: Any) -> Repository:
        repository = Repository(**fields)
        repository.commit(files)
        self.repositories[name] = repository
        return repository


class Refusal(Exception):
    def __init__(self, status: int, code: str = "", said: str = ""):
        super().__init__(status, code, said)
        self.status, self.code, self.said = status, code, said


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        path = urlsplit(self.path).path
        self.body = self._read()
        self.hub.requests.append((self.command, path, "Authorization" in self.headers))
        try:
            if self.hub.answer:
                raise Refusal(self.hub.answer, said=self.hub.said)
            for pattern, answer in ROUTES:
                if (match := re.fullmatch(pattern, f"{self.command} {path}")) is not None:
                    answer(self, *map(unquote, match.groups()))
                    return
            raise Refusal(404, said=f"there is no {path}")
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.said.partition("\n")[0]}
            self._send(refusal.status, json.dumps({"error": refusal.said}).encode(), **headers)

    def _read(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def _is_known(self) -> bool:
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            raise Refusal(401, said="Invalid credentials in Authorization header")
        return given is not None

    def _repository(self, name: str) -> Repository:
        repository, known = self.hub.repositories.get(name), self._is_known()
        if repository is None or (repository.private and not known):
            raise Refusal(404 if known else 401, "RepoNotFound", "Repository not found")
        return repository

    def _at(self, name: str, revision: str) -> tuple[str, Files]:
        found = self._repository(name).at(revision)
        if found is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def _writable(self, name: str) -> Repository:
        if not self._is_known():
            raise Refusal(401, said="Invalid username or password.")
        if not name.startswith("me/"):
            raise Refusal(403, said="You don't have the rights to create a model under this namespace")
        return self._repository(name)

    def _info(self, name: str, revision: str = "main") -> None:
        sha, files = self._at(name, revision)
        siblings = [{"rfilename": path} for path in files]
        private = self.hub.repositories[name].private
        self._json({"id": name, "sha": sha, "private": private, "siblings": siblings, "tags": []})

    def _tree(self, name: str, revision: str) -> None:
        _, files = self._at(name, revision)
        entries = []
        for path, content in files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": _git(content)}
            if path.endswith(self.hub.large):
                entry["lfs"] = {"oid": _sha(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self._json(entries)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        sha, files = self._at(name, revision)
        if self.hub.repositories[name].gated:
            raise Refusal(403 if self._is_known() else 401, "GatedRepo", "Access to this model is restricted")
        if path not in files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        content, headers = files[path], {"X-Repo-Commit": sha}
        if path.endswith(self.hub.large):
            headers |= {"X-Linked-Etag": f'"{_sha(content)}"', "X-Linked-Size": str(len(content))}
            self.hub.blobs[_sha(content)] = content
            self._send(302, **headers, Location=f"{self.hub.storage}/{_sha(content)}")
        else:
            self._send(200, content, ETag=f'"{_git(content)}"', **headers)

    def _large(self, sha: str) -> None:
        self._send(200, self.hub.blobs[sha])

    def _create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repositories:
            self._json({"error": "You already created this model repo", "url": f"{self.hub.address}/{name}"}, 409)
            return
        self.hub.repositories[name] = Repository()  # for _writable, which is asked first
        try:
            self._writable(name)
        except Refusal:
            del self.hub.repositories[name]
            raise
        private = wanted.get("visibility") == "private"
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self._json({"url": f"{self.hub.address}/{name}"})

    def _validate(self) -> None:
        bad = "license: nobody-knows" in json.loads(self.body)["content"]
        errors = [{"message": '"license" must be one of [apache-2.0, mit, ...]'}] if bad else []
        self._json({"errors": errors, "warnings": []}, 400 if bad else 200)

    def _preupload(self, name: str, revision: str) -> None:
        self._writable(name)
        _, files = self._at(name, revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            is_large = file["path"].endswith(self.hub.large)
            answer = {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            if file["path"] in files:
                answer["oid"] = (_sha if is_large else _git)(files[file["path"]])
            answers.append(answer)
        self._json({"files": answers})

    def _batch(self, name: str) -> None:
        self._writable(name)
        objects = []
        for item in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.storage}/{item['oid']}"}}
            objects.append(item if item["oid"] in self.hub.blobs else {**item, "actions": upload})
        self._json({"transfer": "basic", "objects": objects})

    def _upload(self, sha: str) -> None:
        assert _sha(self.body) == sha, "what came is not what was announced"
        self.hub.blobs[sha] = self.body
        self._send(200)

    def _commit(self, name: str, branch: str) -> None:
        repository = self._writable(name)
        files, message = dict(self._at(name, branch)[1]), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, said=f"what is {item['key']}?")
        sha = repository.commit(files, branch, message)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.address}/{name}/commit/{sha}"})

    def _branch(self, name: str, branch: str) -> None:
        repository = self._writable(name)
        repository.branches[branch] = repository.branches["main"]
        self._json({})


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git(content: bytes) -> str:
    """As git names the content of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


NAME, REST = "([^/]+/[^/]+)", "([^/]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (f"GET /api/models/{NAME}", _Handler._info),
    (f"GET /api/models/{NAME}/revision/{REST}", _Handler._info),
    (f"GET /api/models/{NAME}/tree/{REST}", _Handler._tree),
    (f"(?:GET|HEAD) /{NAME}/resolve/{REST}/(.+)", _Handler._resolve),
    (f"GET /large/{REST}", _Handler._large),
    ("POST /api/repos/create", _Handler._create),
    ("POST /api/validate-yaml", _Handler._validate),
    (f"POST /api/models/{NAME}/preupload/{REST}", _Handler._preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", _Handler._batch),
    (f"PUT /large/{REST}", _Handler._upload),
    (f"POST /api/models/{NAME}/commit/{REST}", _Handler._commit),
    (f"POST /api/models/{NAME}/branch/{REST}", _Handler._branch),
]
