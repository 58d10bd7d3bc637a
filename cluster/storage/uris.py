"""URIs of objects: the one form that every function takes and returns."""

from __future__ import annotations

import os
from urllib.parse import unquote, urlsplit

from cluster.errors import ConfigError


def join(uri: str, *parts: str) -> str:
    """`uri` with path parts added, in the one form that every function here returns.

    Bare paths and file:// become absolute local paths; empty parts and outer slashes vanish.
    """
    base = normal(uri)
    extra = [part.strip("/") for part in parts if part.strip("/")]
    if "://" in base:
        return "/".join([base, *extra])
    return os.path.normpath(os.path.join(base, *extra))  # noqa: PTH118 (Path keeps "..")


def normal(uri: str) -> str:
    """The URI in its one form; raises ConfigError when it names no bucket, or a protocol that nothing speaks."""
    if uri.startswith("s3://"):
        bucket = uri[5:].strip("/")
        if not bucket:
            raise ConfigError(f"'{uri}' names no bucket", expected="s3://BUCKET/…")
        return "s3://" + bucket
    if uri.startswith("file:"):
        uri = unquote(urlsplit(uri).path)
    elif "://" in uri:
        require_protocol(uri)
        return uri.rstrip("/")
    return os.path.abspath(uri)  # noqa: PTH100 (Path.resolve would follow links)


def scheme(uri: str) -> str:
    """What stands before the paths of a store's own listing: "s3://", or nothing."""
    return "s3://" if normal(uri).startswith("s3://") else ""


def not_writable(uri: str) -> ConfigError:
    """The error for a write to a store that is read only."""
    return ConfigError(
        f"'{uri}' is not a kind of storage that this project writes to",
        expected="a local path, file:///… or s3://BUCKET/…",
        remedy="most object stores speak S3: set AWS_ENDPOINT_URL to theirs and use s3://",
    )


def require_protocol(uri: str) -> None:
    """Raise ConfigError unless fsspec knows the protocol and the package that speaks it is installed."""
    import fsspec

    protocol = uri.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise ConfigError(
            f"reading '{uri}' needs a package that is not installed",
            expected=f"an fsspec file system for {protocol}://",
            found=str(error),
            remedy="install it, or, where the store speaks S3, set AWS_ENDPOINT_URL to it and use s3://",
        ) from None
    except ValueError:
        raise not_writable(uri) from None
