"""A proxy before an S3 server: answers 503, loses or cuts answers, drops preconditions; as told, or at random."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>'
    b"<Error><Code>SlowDown</Code><Message>reduce your rate</Message></Error>"
)
NOT_IMPLEMENTED = (
    b'<?xml version="1.0" encoding="UTF-8"?>'
    b"<Error><Code>NotImplemented</Code><Message>not implemented</Message></Error>"
)
READ_FAULTS = ("503", "reset", "truncated")
WRITE_FAULTS = ("503", "lost")
_METHODS = ("PUT", "GET", "HEAD", "POST", "DELETE")


class FaultyS3(ThreadingHTTPServer):
    """Forwards to an S3 server; the attributes say what goes wrong.

    methods: which requests are meant. refuse: how many of the next get a 503. lose: how many of the next are carried
    out but never answered. rate: the share of them that goes wrong at random, by each of `faults` in turn: "503",
    "lost", "reset" and "truncated" (half of the answer, then the connection ends; of a HEAD's, nothing). lacks: words
    of a query that the store answers with 501, as one that has no such operation. strip: request headers that the
    store never sees; it must not check signatures, which cover them. seen: counts what happened by fault; hits by
    (method, fault).
    """

    daemon_threads = True

    def __init__(
        self, upstream: str, rate: float = 0.0, faults: tuple[str, ...] = WRITE_FAULTS, seed: int = 0
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.rate, self.faults = rate, faults
        # For each method apart: how many faults some number of its requests meets depends on the seed alone.
        self.random = {method: random.Random(f"{seed} {method}") for method in _METHODS}
        self.lock = threading.Lock()
        self.refuse = self.lose = 0
        self.strip: set[str] = set()
        self.lacks: set[str] = set()
        self.methods = set(_METHODS)
        self.seen: Counter[str] = Counter()
        self.hits: Counter[tuple[str, str]] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self, method: str) -> str:
        """What goes wrong with this request; empty when nothing does."""
        with self.lock:
            name = ""
            if method in self.methods:
                if self.refuse > 0:
                    self.refuse -= 1
                    name = "503"
                elif self.lose > 0:
                    self.lose -= 1
                    name = "lost"
                elif self.random[method].random() < self.rate:
                    name = self.faults[
                        sum(self.hits[method, fault] for fault in self.faults) % len(self.faults)
                    ]
            self.seen[name] += 1
            self.hits[method, name] += 1
            return name

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up are part of the game


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyS3

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault(self.command)
        if fault == "503":
            self._answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN, len(SLOW_DOWN))
            return
        if self.server.lacks & {word.partition("=")[0] for word in urlsplit(self.path).query.split("&")}:
            self._answer(501, {"Content-Type": "application/xml"}, NOT_IMPLEMENTED, len(NOT_IMPLEMENTED))
            return
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=30)
        # Host goes along unchanged: it is part of the signature.
        headers = {k: v for k, v in self.headers.items() if k.lower() not in self.server.strip}
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        if fault != "lost" and not (fault and self.command == "HEAD"):
            skip = {"transfer-encoding", "connection", "date", "server", "content-length"}
            kept = {k: v for k, v in answer.getheaders() if k.lower() not in skip}
            length = int(answer.getheader("Content-Length", len(data)))
            self._answer(answer.status, kept, data[: len(data) // 2] if fault else data, length)
        if fault == "reset":  # an RST instead of a FIN
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault:
            self.close_connection = True
            self.connection.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes, length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def faulty_s3(upstream: str, rate: float = 0.0, faults: tuple[str, ...] = WRITE_FAULTS) -> Iterator[FaultyS3]:
    """Run the proxy in a thread."""
    server = FaultyS3(upstream, rate, faults)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
