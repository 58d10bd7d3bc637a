"""A faulty proxy before moto."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import S3Server
from tests.faulty_s3 import FaultyS3, faulty_s3


@pytest.fixture
def proxy(moto: S3Server, moto_root: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """The proxy, as the endpoint of `moto_root`."""
    with faulty_s3(moto.url) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server
