"""Which store a URI belongs to, and the clients behind the stores: the only importer of s3fs."""

from __future__ import annotations

import functools
import os
from typing import Any

from cluster.storage.foreign import ForeignObjects
from cluster.storage.local_files import LocalFiles
from cluster.storage.s3_objects import S3Objects
from cluster.storage.uris import normal

_LOCAL = LocalFiles()
_S3: dict[tuple[str | int | None, ...], S3Objects] = {}


def store_of(uri: str) -> tuple[Any, str]:
    """The store of a URI, and the object's path in it."""
    form = normal(uri)
    if form.startswith("s3://"):
        return _s3(), form[5:]
    return (_foreign() if "://" in form else _LOCAL), form


@functools.cache
def _foreign() -> ForeignObjects:
    import aiohttp
    import fsspec
    from fsspec.exceptions import FSTimeoutError

    def open_filesystem(uri: str) -> tuple[Any, str]:
        options: dict[str, Any] = {"use_listings_cache": False}
        if uri.startswith(("http://", "https://")):
            # aiohttp's own limit is five minutes for a whole answer, which cuts large files off.
            limits = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
            options["client_kwargs"] = {"timeout": limits}
        return fsspec.url_to_fs(uri, **options)

    passing = (ConnectionError, TimeoutError, FSTimeoutError)
    return ForeignObjects(
        open_filesystem, (*passing, aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)
    )


def _s3() -> S3Objects:
    """This process's S3 client; another one after a fork, or when the environment names another store."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_REGION")
    # Clients of a parent process stay in the dict untouched: closing one here would reach into the
    # parent's event loop, with which it shares the epoll descriptor.
    key = (os.getpid(), *(os.environ.get(name) for name in names))
    if key not in _S3:
        from botocore.exceptions import BotoCoreError, IncompleteReadError, SSLError
        from botocore.exceptions import ConnectionError as BotoConnectionError
        from s3fs import S3FileSystem
        from s3fs.core import S3_RETRYABLE_ERRORS

        filesystem = S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            config_kwargs={
                "retries": {"mode": "standard", "max_attempts": 10},
                "read_timeout": 60,
                "max_pool_connections": 64,
            },
        )
        filesystem.retries = 1  # its own back-off has no jitter; botocore's and ours do
        _S3[key] = S3Objects(
            filesystem,
            endpoint=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS S3",
            transient_errors=(
                *S3_RETRYABLE_ERRORS,
                BotoConnectionError,
                IncompleteReadError,
                ConnectionError,
            ),
            fatal_errors=(SSLError,),
            client_errors=(BotoCoreError, ValueError),
        )
    return _S3[key]
