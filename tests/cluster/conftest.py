"""A proxy before moto that loses answers, answers 503, or drops preconditions."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.conftest import S3Server

UNAVAILABLE = (
    b'<?xml version="1.0" encoding="UTF-8"?>'
    b"<Error><Code>SlowDown</Code><Message>reduce your rate</Message></Error>"
)


class FaultyProxy(ThreadingHTTPServer):
    """Forwards to an S3 server that checks no signatures; the attributes say what goes wrong.

    refuse: how many of the next requests get a 503. lose: how many of the next requests are carried out but
    never answered. strip: request headers that the store never sees. methods: which requests are meant.
    """

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.lock = threading.Lock()
        self.refuse = self.lose = self.requests = 0
        self.strip: set[str] = set()
        self.methods = {"PUT", "GET", "HEAD", "POST", "DELETE"}

    def take(self, what: str, method: str) -> bool:
        """Whether the fault `what` strikes this request; counts it down."""
        with self.lock:
            left = getattr(self, what)
            if method not in self.methods or left <= 0:
                return False
            setattr(self, what, left - 1)
            return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up are part of the game


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            self.server.requests += 1
        if self.server.take("refuse", self.command):
            self._answer(503, {"Content-Type": "application/xml"}, UNAVAILABLE)
            return
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=10)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in self.server.strip}
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        if self.server.take("lose", self.command):
            self.close_connection = True
            self.connection.close()
            return
        skip = {"transfer-encoding", "connection", "date", "server"}
        kept = {k: v for k, v in answer.getheaders() if k.lower() not in skip}
        self._answer(answer.status, kept, data)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def proxy(moto: S3Server, moto_root: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """The proxy, as the endpoint of `moto_root`."""
    server = FaultyProxy(moto.url)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
