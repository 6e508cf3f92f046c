"""A local Hub server for the tests of downloads, with the addresses, headers and errors that the client relies on.

Small files are served as git blobs; files in ``lfs`` are redirected to a second host name, as the Hub sends large
files to its content network. Faults are queued per request, and every request is logged with its headers.
"""

import hashlib
import json
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Hosted:
    """A repository: commits (commit -> name -> content), branches and tags (name -> commit), metadata of its card."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    card: dict = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit that holds ``files`` and move ``branch`` to it; returns its id."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[commit] = files
        self.refs[branch] = commit
        return commit

    def at(self, revision: str) -> str | None:
        """The commit of a revision; None if there is no such revision."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests whose "METHOD path" matches ``request``.

    A ``status`` is answered instead, with ``headers`` and ``content``; without one the answer holds ``content``, or is
    cut after ``cut`` bytes.
    """

    request: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = -1  # negative: not cut
    content: bytes | None = None
    times: int = 1


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]  # names in lower case


class HubServer:
    """The server's state; ``address`` is what HF_ENDPOINT takes."""

    def __init__(self, port: int, scheme: str = "http") -> None:
        self.address = f"{scheme}://127.0.0.1:{port}"
        self.content_address = f"{scheme}://localhost:{port}"  # another host name: the client must send no token there
        self.repositories: dict[str, Hosted] = {}  # "models/owner/name" or "datasets/owner/name"
        self.prefix = ""  # of every path, for a mirror below a path of its host
        self.token = "hf_goodtoken"
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.lock = threading.Lock()

    def host(self, name: str, files: dict[str, bytes], lfs: set[str] = frozenset(), kind: str = "models") -> Hosted:
        """Host ``files`` as the repository ``name``, on its branch main."""
        hosted = Hosted(lfs=set(lfs))
        hosted.commit(files)
        self.repositories[f"{kind}/{name}"] = hosted
        return hosted

    def asked(self, pattern: str) -> list[Request]:
        """The requests so far whose "METHOD path" matches."""
        return [request for request in self.requests if re.search(pattern, f"{request.method} {request.path}")]

    def fault_of(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.request, f"{method} {path}"):
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def serve(certificate: Path | None = None) -> Iterator[HubServer]:
    """Run a Hub on a free port of this machine until the block ends; over TLS with a ``certificate`` and its key."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub = HubServer(server.server_address[1], "https" if certificate else "http")
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def git_blob(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub: HubServer = self.server.hub
        path = unquote(urlsplit(self.path).path).removeprefix(hub.prefix)
        hub.requests.append(Request(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        fault = hub.fault_of(self.command, path)
        if fault and fault.status:
            return self.answer(fault.status, fault.content or b"", fault.headers)
        if match := re.fullmatch(r"/content/([0-9a-f]{64})", path):
            return self.content(match[1], fault)
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree)/(.+)", path):
            kind, name, what, revision = match.groups()
            found = self.find(f"{kind}/{name}", revision)
            if found:
                self.json(self.info(name, *found) if what == "revision" else self.tree(*found))
            return None
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve("datasets" if match[1] else "models", *match.groups()[1:], fault)
        return self.answer(404, b"")

    def find(self, key: str, revision: str) -> tuple[Hosted, str] | None:
        """The repository and the commit; where there is none the error is answered here."""
        hosted = self.server.hub.repositories.get(key)
        if hosted is None:
            return self.error(401, "RepoNotFound", "Repository not found")
        commit = hosted.at(revision)
        if commit is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return hosted, commit

    def info(self, name: str, hosted: Hosted, commit: str) -> dict:
        siblings = []
        for file, content in hosted.commits[commit].items():
            entry = {"rfilename": file, "size": len(content), "blobId": git_blob(content)}
            if file in hosted.lfs:
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        return {"id": name, "sha": commit, "private": False, "cardData": hosted.card, "siblings": siblings}

    def tree(self, hosted: Hosted, commit: str) -> list[dict]:
        entries = []
        for file, content in hosted.commits[commit].items():
            entry = {"type": "file", "path": file, "size": len(content), "oid": git_blob(content)}
            if file in hosted.lfs:
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return entries

    def resolve(self, kind: str, name: str, revision: str, file: str, fault: Fault | None) -> None:
        found = self.find(f"{kind}/{name}", revision)
        if not found:
            return None
        hosted, commit = found
        if hosted.gated and self.headers.get("Authorization") != f"Bearer {self.server.hub.token}":
            return self.error(403, "GatedRepo", "Access to this repository is restricted")
        content = hosted.commits[commit].get(file)
        if content is None:
            return self.error(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit}
        if file not in hosted.lfs:
            return self.body(content, fault, headers | {"ETag": f'"{git_blob(content)}"'})
        sha256 = hashlib.sha256(content).hexdigest()
        headers["Location"] = f"{self.server.hub.content_address}/content/{sha256}"
        headers["X-Linked-Etag"], headers["X-Linked-Size"] = f'"{sha256}"', str(len(content))
        return self.answer(302, b"", headers)

    def content(self, sha256: str, fault: Fault | None) -> None:
        for hosted in self.server.hub.repositories.values():
            for files in hosted.commits.values():
                for content in files.values():
                    if hashlib.sha256(content).hexdigest() == sha256:
                        return self.body(content, fault, {"ETag": f'"{sha256}"'})
        return self.answer(404, b"")

    def body(self, content: bytes, fault: Fault | None, headers: dict[str, str]) -> None:
        """Answer with ``content`` or the requested range of it; a fault may truncate or replace it."""
        content = fault.content if fault and fault.content is not None else content
        start, status = 0, 200
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, status = int(match[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        sent = content[start:]
        self.answer(status, sent, headers, fault.cut if fault else -1)

    def json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def error(self, status: int, code: str, message: str) -> None:
        self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None, cut: int = -1) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content if cut < 0 else content[:cut])
        self.close_connection = cut >= 0
