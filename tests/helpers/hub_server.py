"""A hub on this machine: what huggingface_hub asks of the real one when it fetches a file.

HEAD and GET of /OWNER/NAME/resolve/REVISION/FILE with ETag, X-Repo-Commit and X-Error-Code, and of
a part of a file (Range). Every request is kept, and what goes wrong is told beforehand.
"""
import contextlib
import hashlib
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKEN = "hf_of_somebody_who_may"


@dataclass
class Model:
    """A repository: its files, and the commits that its revisions are."""
    files: dict[str, Path]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": "1" * 40})
    gated: bool = False         # as those of Llama are: only a TOKEN gets the files


class Hub:
    """models: by name.

    Attributes: url; requests, ("HEAD" or "GET", path, Range or None) of each; cuts, of a file after
    how many bytes of an answer the connection breaks, for as many answers as are listed.
    """

    def __init__(self, models: dict[str, Model]):
        self.models, self.cuts, self.requests = models, {}, []
        self.pause = 0.0                # seconds before a file is sent
        self.at_once: tuple[str, ...] = ()

    def open_for(self, *files: str) -> None:
        """Send these without a pause."""
        self.at_once = files

    def asked(self) -> list[tuple]:
        """The requests for files: the package asks for other things too."""
        return [request for request in self.requests if "/resolve/" in request[1]]

    def fetched(self) -> set[str]:
        """The names of the files that were sent."""
        return {path.rsplit("/", 1)[1] for method, path, _ in self.asked() if method == "GET"}

    def got(self, file: str) -> list[str | None]:
        """The Range of every GET of a file."""
        return [part for method, path, part in self.requests
                if method == "GET" and path.endswith(f"/{file}")]

    @contextlib.contextmanager
    def serve(self) -> Iterator["Hub"]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.requests.append((request.command, request.path, request.headers.get("Range")))
        match = re.fullmatch(r"/(\w[\w.-]*/\w[\w.-]*)/resolve/([^/]+)/(.+)", request.path)
        model = self.models.get(match[1]) if match else None
        if model is None:
            return refuse(request, 401, "RepoNotFound")
        commit = model.revisions.get(match[2], match[2])
        if commit not in model.revisions.values():
            return refuse(request, 404, "RevisionNotFound")
        if model.gated and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            known = "Authorization" in request.headers
            return refuse(request, 403 if known else 401, "GatedRepo")
        if match[3] not in model.files:
            return refuse(request, 404, "EntryNotFound", {"X-Repo-Commit": commit})
        self.send(request, model.files[match[3]], commit)

    def send(self, request: BaseHTTPRequestHandler, file: Path, commit: str) -> None:
        content = file.read_bytes()
        start = 0
        if part := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "")):
            start = int(part[1])
        request.send_response(206 if part else 200)
        request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        request.send_header("X-Repo-Commit", commit)
        request.send_header("Accept-Ranges", "bytes")
        request.send_header("Content-Length", str(len(content) - start))
        if part:
            place = f"bytes {start}-{len(content) - 1}/{len(content)}"
            request.send_header("Content-Range", place)
        request.end_headers()
        if request.command == "HEAD":
            return
        if file.name not in self.at_once:
            time.sleep(self.pause)
        cuts = self.cuts.get(file.name, [])
        if cuts:
            request.wfile.write(content[start:start + cuts.pop(0)])
            request.close_connection = True         # less than was promised
        else:
            request.wfile.write(content[start:])


def refuse(request: BaseHTTPRequestHandler, status: int, code: str, headers: dict = {}) -> None:
    request.send_response(status)
    for name, value in {"X-Error-Code": code, "Content-Length": "0", **headers}.items():
        request.send_header(name, value)
    request.end_headers()
