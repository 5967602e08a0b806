"""Two hubs on loopback for the tests: the part of their HTTP interfaces that the published clients use.

Hugging Face: repository info and tree as JSON, HEAD and GET of files with X-Repo-Commit, ETag and, for
large files, a redirect to another address with X-Linked-ETag and X-Linked-Size. ModelScope: the listing of
files and their content by query.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_BYTES = 1 << 16
"""Files from here on are stored with Git LFS and served from another address."""


@dataclass
class Repository:
    """Commits and the names that point at them; the last commit is the head of `main` (or `master`)."""

    commits: dict[str, dict[str, bytes]]
    tags: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    library: str | None = None
    sizes: bool = True
    """Whether the listing tells sizes."""

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, tag or commit."""
        if revision in ("main", "master"):
            return list(self.commits)[-1]
        return self.tags.get(revision, revision if revision in self.commits else None)


class Hub(ThreadingHTTPServer):
    """The server: `repositories` by id, `requests` as (method, path) in the order they came."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.refused: str | None = None
        """Paths that hold this are answered with 503; "" refuses everything."""

    @property
    def endpoint(self) -> str:
        """Address without a slash at the end."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def store(self) -> str:
        """Address of large files: another host, whose redirects the client does not follow by itself."""
        return f"http://localhost:{self.server_address[1]}"

    def fetched(self) -> list[str]:
        """Last part of every path whose content was asked for."""
        return [path.rsplit("/", 1)[-1] for method, path in self.requests if method == "GET" and "/api/" not in path]


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that is closed afterwards."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def sha256(content: bytes) -> str:
    """As LFS and ModelScope name content."""
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    """As git names content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.server.requests.append((self.command, path))
        if self.server.refused is not None and self.server.refused in path:
            return self._send(503, b"")
        parts = path.strip("/").split("/")
        if parts[:3] == ["api", "v1", "models"]:
            return self._modelscope("/".join(parts[3:5]), "/".join(parts[5:]), parse_qs(url.query))
        if parts[0] == "lfs":
            return self._content(parts[1])
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        repository = self.server.repositories.get(name)
        if repository is None:
            return self._error(404, "RepoNotFound")
        rest = parts[4:] if parts[0] == "api" else parts[2:]
        revision = "main" if not rest else unquote(rest[1])
        commit = repository.resolve(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        files = repository.commits[commit]
        if parts[0] != "api":
            return self._file(repository, commit, "/".join(rest[2:]))
        if rest and rest[0] == "tree":
            return self._json([_tree_entry(file, content) for file, content in files.items()])
        siblings = [_sibling(file, content, repository.sizes) for file, content in files.items()]
        return self._json({"id": name, "sha": commit, "library_name": repository.library, "siblings": siblings})

    def _file(self, repository: Repository, commit: str, path: str) -> None:
        if repository.gated:
            return self._error(403, "GatedRepo")
        content = repository.commits[commit].get(path)
        if content is None:
            return self._error(404, "EntryNotFound")
        headers = {"X-Repo-Commit": commit}
        if len(content) < LARGE_BYTES:
            return self._send(200, content, {**headers, "ETag": f'"{git_sha1(content)}"'})
        digest = sha256(content)
        linked = {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        return self._send(302, b"", {**headers, **linked, "Location": f"{self.server.store}/lfs/{digest}/{path}"})

    def _content(self, digest: str) -> None:
        for repository in self.server.repositories.values():
            for files in repository.commits.values():
                for content in files.values():
                    if sha256(content) == digest:
                        return self._send(200, content, {"ETag": f'"{digest}"'})
        return self._error(404, "EntryNotFound")

    def _modelscope(self, name: str, what: str, query: dict[str, list[str]]) -> None:
        repository = self.server.repositories.get(name)
        # Branches and tags only: commits are refused.
        asked = query.get("Revision", ["master"])[0]
        commit = None if repository is None or asked in repository.commits else repository.resolve(asked)
        if repository is None or commit is None:
            return self._json({"Code": 10010205001, "Message": "not found", "Success": False}, 404)
        if what == "repo":
            content = repository.commits[commit].get(query["FilePath"][0])
            return self._send(404 if content is None else 200, content or b"")
        entries = listing(repository, commit)
        return self._json({"Code": 200, "Data": {"Files": entries}, "Success": True})

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _sibling(path: str, content: bytes, sizes: bool) -> dict[str, object]:
    entry: dict[str, object] = {"rfilename": path, "blobId": git_sha1(content)}
    if sizes:
        entry["size"] = len(content)
    if len(content) >= LARGE_BYTES:
        entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
    return entry


def _tree_entry(path: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "oid": git_sha1(content), "size": len(content)}
    if len(content) >= LARGE_BYTES:
        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
    return entry


def listing(repository: Repository, commit: str) -> list[dict[str, object]]:
    """ModelScope's list of files: each with the commit that brought it and that commit's date."""
    entries: list[dict[str, object]] = []
    order = list(repository.commits)
    for path, content in repository.commits[commit].items():
        brought = commit
        for earlier in reversed(order[: order.index(commit)]):
            if repository.commits[earlier].get(path) != content:
                break
            brought = earlier
        entry = {"Path": path, "Name": path, "Type": "blob", "Size": len(content), "Sha256": sha256(content)}
        entries.append({**entry, "Revision": brought, "CommittedDate": 1_700_000_000 + order.index(brought)})
    return entries
