"""A proxy before an S3 server that answers a share of the GET requests wrongly: 503, reset, or cut short."""

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

SLOW_DOWN = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>slow down</Message></Error>'
FAULTS = ("503", "reset", "truncated")


class FaultyS3(ThreadingHTTPServer):
    """Each GET goes wrong with probability `rate`, in one of FAULTS; `seen` counts what happened."""

    daemon_threads = True

    def __init__(self, upstream: str, rate: float, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.rate, self.random, self.lock = rate, random.Random(seed), threading.Lock()
        self.seen: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self) -> str:
        with self.lock:
            name = self.random.choice(FAULTS) if self.random.random() < self.rate else "none"
            self.seen[name] += 1
            return name

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up are part of the game


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyS3

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault() if self.command == "GET" else "none"
        if fault == "503":
            self._answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN, len(SLOW_DOWN))
            return
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=30)
        # Host goes along unchanged: it is part of the signature.
        upstream.request(self.command, self.path, body, dict(self.headers.items()))
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        length = int(answer.getheader("Content-Length", len(data)))
        sent = data if fault == "none" else data[: len(data) // 2]
        skip = {"transfer-encoding", "connection", "date", "server", "content-length"}
        headers = {k: v for k, v in answer.getheaders() if k.lower() not in skip}
        self._answer(answer.status, headers, sent, length)
        if fault == "reset":  # an RST instead of a FIN
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault != "none":
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
def faulty_s3(upstream: str, rate: float) -> Iterator[FaultyS3]:
    """Run the proxy in a thread."""
    server = FaultyS3(upstream, rate)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
