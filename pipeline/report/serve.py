"""Serves a report live: pages are made when they are asked for, of a snapshot that is a few seconds old at most."""

from __future__ import annotations

import hashlib
import logging
import mimetypes
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from cluster.errors import ItpnError
from pipeline.report.read import Reader, Snapshot
from pipeline.report.site import Site

log = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"
# A root that takes long to read is read less often, so that watching it costs at most a tenth of a core.
REST = 10.0


class LiveReport:
    """The report of a root that is being written to.

    Args:
        root: URI under which every output lives.
        every_s: the root is read at most this often, and pages ask for news as often.

    The constructor reads the root once; raises StorageUnavailable, DataInvalid or PreflightError.
    """

    def __init__(self, root: str, every_s: int = 3) -> None:
        self._reader, self._every_s = Reader(root), every_s
        self._lock = threading.Lock()
        began = time.monotonic()
        # With the pages made so far; replaced as one, so that no thread mixes two sites.
        self._shown: tuple[Site, dict[str, bytes]] = (self._site(self._reader.snapshot()), {})
        self._next = self._rested(began)

    def read(self, path: str) -> bytes | None:
        """One file of the report as it is now; None when there is none of this name.

        While another thread reads the root, or it does not answer, the pages are those of before. Raises
        StorageUnavailable for a page that was not asked for before, and cannot be made now.
        """
        if time.monotonic() >= self._next and self._lock.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._lock.release()
        site, made = self._shown
        data = made.get(path) or site.read(path)
        if data is not None:
            made[path] = data
        return data

    def _look(self) -> None:
        began, site = time.monotonic(), self._shown[0]
        try:
            snapshot = self._reader.snapshot()
            if site.problem or site.snapshot != snapshot:
                self._shown = self._site(snapshot), {}
        except ItpnError as error:
            log.warning("the root cannot be read: %s", error)
            problem = f"The root cannot be read; this is older. {error.message}"
            if site.problem != problem:
                self._shown = self._site(site.snapshot, problem), {}
        self._next = self._rested(began)

    def _site(self, snapshot: Snapshot, problem: str = "") -> Site:
        return Site(snapshot, live_s=self._every_s, problem=problem)

    def _rested(self, began: float) -> float:
        now = time.monotonic()
        return now + max(self._every_s, REST * (now - began))


def make_server(report: LiveReport, port: int) -> ThreadingHTTPServer:
    """A server of the report on 127.0.0.1; port 0 takes a free one. Call its `serve_forever`.

    Raises OSError when the port is taken.
    """

    class Handler(_Handler):
        live = report

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    return Server((ADDRESS, port), Handler)


class _Handler(BaseHTTPRequestHandler):
    live: LiveReport
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "itpn", ""

    def do_GET(self) -> None:
        # A page of somebody else's whose name was made to point here must not read the report.
        if (self.headers.get("Host") or "").rsplit(":", 1)[0] not in (ADDRESS, "localhost"):
            self._answer(403, b"only for this machine", "text/plain")
            return
        path = unquote(urlsplit(self.path).path).lstrip("/") or "index.html"
        try:
            data = self.live.read(path)
        except ItpnError as error:
            self._answer(503, str(error).encode(), "text/plain")
            return
        if data is None:
            self._answer(404, b"there is no such page", "text/plain")
            return
        self._answer(200, data, mimetypes.guess_type(path)[0] or "application/octet-stream")

    do_HEAD = do_GET

    def _answer(self, status: int, data: bytes, kind: str) -> None:
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        known = status == 200 and self.headers.get("If-None-Match") == tag
        self.send_response(304 if known else status)
        self.send_header("ETag", tag)
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        if not known:
            text = kind.startswith("text/") or kind == "application/javascript"
            self.send_header("Content-Type", f"{kind}; charset=utf-8" if text else kind)
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD" and not known:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)
