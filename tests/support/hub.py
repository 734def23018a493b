"""A small hub of the test's own: as much of huggingface.co's API as a download needs."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_CHUNK = 1 << 16


class Hub:
    """Serves `files` of one repository at `url`. Weights are kept as the hub keeps large files, by their SHA-256.

    `status` other than 200 is answered to everything. `cut_after` closes the connection after so many bytes of weights,
    once. `bytes_per_s` is how fast weights come. `sizes` may claim other sizes than files have.
    """

    def __init__(self, name: str, files: dict[str, bytes]) -> None:
        self.name = name
        self.files = files
        self.revisions = {"main", COMMIT}
        self.status = 200
        self.error_code = ""
        self.cut_after: int | None = None
        self.bytes_per_s: float | None = None
        self.sizes: dict[str, int] = {}
        self.ranges: list[str | None] = []  # of the requests for weights
        self.sent = 0  # bytes of weights
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.url = ""

    def siblings(self) -> list[dict[str, Any]]:
        return [self._entry("rfilename", name, data) for name, data in self.files.items()]

    def tree(self) -> list[dict[str, Any]]:
        entries = [self._entry("path", name, data) for name, data in self.files.items()]
        return [{**entry, "type": "file", "oid": entry["blobId"]} for entry in entries]

    def _entry(self, key: str, name: str, data: bytes) -> dict[str, Any]:
        size = self.sizes.get(name, len(data))
        entry: dict[str, Any] = {key: name, "size": size, "blobId": hashlib.sha1(data).hexdigest()}
        if is_large(name):
            digest = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"sha256": digest, "oid": digest, "size": size, "pointerSize": 134}
        return entry


def is_large(name: str) -> bool:
    return name.endswith(".safetensors")


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(path)
            hub.tokens.add(self.headers.get("Authorization"))
            if hub.status != 200:
                return self._error(hub.status, hub.error_code)
            for prefix, document in (("", "info"), ("/tree", "tree")):
                base = f"/api/models/{hub.name}{prefix}"
                if (
                    path == base
                    or (not prefix and path.startswith(f"{base}/revision/"))
                    or (prefix and path.startswith(f"{base}/"))
                ):
                    return self._document(document, path)
            _, found, rest = path.partition(f"/{hub.name}/resolve/")
            revision, _, name = rest.partition("/")
            if not found or name not in hub.files:
                return self._error(404, "EntryNotFound" if found else "RepoNotFound")
            return self._file(name, body) if revision in hub.revisions else self._error(404, "RevisionNotFound")

        def _document(self, kind: str, path: str) -> None:
            revision = path.rpartition("/")[2] if "/revision/" in path or kind == "tree" else "main"
            if revision not in hub.revisions:
                self._error(404, "RevisionNotFound")
                return
            info = {"id": hub.name, "modelId": hub.name, "sha": COMMIT, "private": False, "tags": [], "downloads": 0}
            answer = hub.tree() if kind == "tree" else {**info, "siblings": hub.siblings()}
            raw = json.dumps(answer).encode()
            self._head(200, len(raw), {"Content-Type": "application/json"})
            self.wfile.write(raw)

        def _file(self, name: str, body: bool) -> None:
            data = hub.files[name]
            digest = hashlib.sha256(data) if is_large(name) else hashlib.sha1(data)
            start, wanted = 0, self.headers.get("Range")
            if wanted:
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers = {"ETag": f'"{digest.hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if wanted:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._head(206 if wanted else 200, len(data) - start, headers)
            if body and is_large(name):
                hub.ranges.append(wanted)
                self._trickle(data[start:])
            elif body:
                self.wfile.write(data)

        def _trickle(self, data: bytes) -> None:
            try:
                for place in range(0, len(data), _CHUNK):
                    chunk = data[place : place + _CHUNK]
                    if hub.cut_after is not None and hub.sent >= hub.cut_after:
                        hub.cut_after = None
                        self.close_connection = True
                        return
                    self.wfile.write(chunk)
                    hub.sent += len(chunk)
                    if hub.bytes_per_s:
                        time.sleep(len(chunk) / hub.bytes_per_s)
            except OSError:
                self.close_connection = True  # the client left

        def _error(self, status: int, code: str) -> None:
            self._head(status, 0, {"X-Error-Code": code} if code else {})

        def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(length)}.items():
                self.send_header(key, value)
            self.end_headers()

    return Handler
