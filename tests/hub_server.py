"""A server on the loopback that speaks the part of the Hub's API that huggingface_hub calls for this library.

Repositories are commits of files in memory. What it answers (status, X-Error-Code, X-Repo-Commit, ETag, the redirect of
large files) follows huggingface_hub's own code; the transfers of Xet are not spoken.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".png", ".pth", ".bin")  # kept as large files, served by redirect
OWNER, TOKEN = "somebody", "hf_token_of_somebody"


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # oldest first
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, changes: dict[str, bytes], branch: str = "main") -> str:
        """Add files to a branch; returns the commit's hash."""
        files = self.commits.get(self.refs.get(branch, ""), {}) | changes
        told = repr(
            (sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items()), len(self.commits))
        )
        commit = hashlib.sha1(told.encode()).hexdigest()
        self.commits[commit] = files
        self.refs[branch] = commit
        return commit

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.refs.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


class Hub:
    """The state of the server: repositories, uploaded large files, and every request that came."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []
        self.broken = ""  # requests whose path has this are answered with 500
        self.url = ""
        self.far = ""  # another host, where large files are

    def made(self, name: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repository:
        """A repository with a first commit."""
        made = self.repositories[name] = Repository(private)
        made.commit(files or {".gitattributes": b""})
        return made

    def asked(self, part: str) -> list[str]:
        return [f"{method} {path}" for method, path in self.requests if part in path]


@contextlib.contextmanager
def connected(cache: Path, monkeypatch) -> Iterator[Hub]:
    """A Hub that huggingface_hub takes for the real one, with a cache of its own, without Xet and without a token."""
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with running() as hub:
        values = {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        }
        values |= {"HF_HUB_CACHE": str(cache), "HF_TOKEN_PATH": str(cache / "token"), "HF_HUB_OFFLINE": False}
        for name, value in (values | {"HF_HUB_DISABLE_XET": True}).items():
            monkeypatch.setattr(constants, name, value)
        yield hub


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """A Hub that answers at its `url` until the context ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    hub.url, hub.far = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self._body())

    def do_PUT(self) -> None:
        self._answer(self._body())

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @property
    def _user(self) -> str | None:
        return OWNER if self.headers.get("Authorization") == f"Bearer {TOKEN}" else None

    def _answer(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        self.hub.bodies.append(body)
        if self.hub.broken and self.hub.broken in path:
            return self._say(500, {"error": "broken"})
        if self.headers.get("Authorization") and not self._user:
            return self._say(
                401, {"error": "no such token"}, {"X-Error-Message": "Invalid credentials in Authorization header"}
            )
        for pattern, method in _ROUTES:
            if found := re.fullmatch(pattern, path):
                return method(self, body, **found.groupdict())
        return self._say(404, {"error": f"no route for {self.command} {path}"})

    def _say(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str, status: int = 404) -> None:
        self._say(status, {"error": code}, {"X-Error-Code": code})

    def _repository(self, name: str, write: bool = False) -> Repository | None:
        """The repository, if this user may see (or write) it; else the answer is sent, as the Hub says it."""
        found = self.hub.repositories.get(name)
        owned = self._user == name.split("/")[0]
        if found is None or (found.private and not owned):
            self._missing("RepoNotFound", 404 if self._user else 401)
        elif found.gated and not owned:
            self._missing("GatedRepo", 403)
        elif write and not owned:
            self._say(403, {"error": "no right to write"})
        else:
            return found
        return None

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        if not self._user:
            return self._say(401, {"error": "log in"})
        name = f"{asked['organization'] or OWNER}/{asked['name']}"
        if not name.startswith(f"{OWNER}/"):
            return self._say(403, {"error": "not your namespace"})
        if name in self.hub.repositories:
            return self._say(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        private = asked.get("visibility") == "private" or asked.get("private", False)  # public unless it is asked for
        self.hub.made(name, private=private)
        return self._say(200, {"url": f"{self.hub.url}/{name}"})

    def info(self, body: bytes, name: str, revision: str = "main") -> None:
        if (found := self._repository(name)) is None:
            return None
        if (files := found.files(revision)) is None:
            return self._missing("RevisionNotFound")
        commit, held = files
        sizes = [{"rfilename": path, "size": len(data)} for path, data in held.items()]
        if "blobs" not in self.path:
            sizes = [{"rfilename": each["rfilename"]} for each in sizes]
        about = {"id": name, "_id": "1", "sha": commit, "private": found.private, "siblings": sizes, "tags": []}
        return self._say(200, about | {"downloads": 0, "likes": 0})

    def validate(self, body: bytes) -> None:
        try:
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
        except (IndexError, yaml.YAMLError) as error:
            return self._say(400, {"errors": [{"message": str(error)}], "warnings": []})
        return self._say(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if self._repository(name, write=True) is None:
            return None
        paths = [each["path"] for each in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in paths}
        files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        return self._say(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        if self._repository(name, write=True) is None:
            return None
        objects = json.loads(body)["objects"]
        for each in objects:
            if each["oid"] not in self.hub.large:
                each["actions"] = {"upload": {"href": f"{self.hub.far}/large/{each['oid']}"}}
        return self._say(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                return self._say(400, {"error": "another checksum"})
            self.hub.large[oid] = body
            return self._say(200, {})
        return self._send(self.hub.large[oid], {"ETag": f'"{oid}"'})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        if (found := self._repository(name, write=True)) is None:
            return None
        lines = [json.loads(line) for line in body.splitlines()]
        changes = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                changes[value["path"]] = self.hub.large[value["oid"]]
            else:
                changes[value["path"]] = base64.b64decode(value["content"])
        made = found.commit(changes, revision)
        return self._say(200, {"success": True, "commitOid": made, "commitUrl": f"{self.hub.url}/{name}/commit/{made}"})

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        if (found := self._repository(name)) is None:
            return None
        if (files := found.files(revision)) is None:
            return self._missing("RevisionNotFound")
        commit, held = files
        if path not in held:
            return self._missing("EntryNotFound")
        data, about = held[path], {"X-Repo-Commit": commit}
        if not path.endswith(LARGE):
            return self._send(data, about | {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        oid = hashlib.sha256(data).hexdigest()
        self.hub.large[oid] = data
        about |= {
            "X-Linked-Etag": f'"{oid}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.hub.far}/large/{oid}",
        }
        return self._say(302, b"", about)

    def _send(self, data: bytes, headers: dict[str, str]) -> None:
        """The bytes, or those of the range that was asked for."""
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
            said = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            return self._say(206, data[first : last + 1], headers | said)
        if self.command == "HEAD":
            headers = headers | {"Content-Length": str(len(data))}
        return self._say(200, data, headers)


_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.validate),
    (rf"/api/models/{_NAME}", _Handler.info),
    (rf"/api/models/{_NAME}/revision/(?P<revision>.+)", _Handler.info),
    (rf"/api/models/{_NAME}/preupload/(?P<revision>.+)", _Handler.preupload),
    (rf"/api/models/{_NAME}/commit/(?P<revision>.+)", _Handler.commit),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    (r"/large/(?P<oid>[0-9a-f]{64})", _Handler.store),
]
