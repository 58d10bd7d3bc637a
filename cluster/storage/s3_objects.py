"""Object storage over the S3 protocol: what `cluster.storage` does for s3://.

Works on an s3fs file system that `cluster.storage` makes and hands in. Paths are "bucket/key". Each call is
one attempt, cut off after `timeout_s`; retries are the caller's.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

DOWNLOAD_PART_BYTES = 16 << 20
UPLOAD_PART_BYTES = 32 << 20  # above twice this, multipart; at most 10,000 parts: objects up to 320 GB
PARTS_AT_ONCE = 4  # memory of a transfer is part size times this
DELETE_BATCH = 1000  # the most that one DeleteObjects request takes
LIST_PAGE = 1000  # the most that one listing answers

# Error codes that pass by themselves, beside every 5xx and 429. ConditionalRequestConflict: two creates met
# in flight, neither has lost yet.
_TRANSIENT_CODES = {
    "SlowDown",
    "RequestTimeout",
    "OperationAborted",
    "ConditionalRequestConflict",
    "InternalError",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "XAmzContentSHA256Mismatch",
    "BadDigest",
    "IncompleteBody",
}
_LOST_RACE = {"PreconditionFailed", "412"}
_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile, or a role)"


class S3Objects:
    """The store behind "bucket/key" paths.

    Args:
        filesystem: an `s3fs.S3FileSystem` of this process.
        endpoint: how to name the store in messages.
        transient_errors: exception types that pass by themselves (connections, timeouts).
        fatal_errors: subtypes of those that do not (certificates).
        client_errors: exception types of the client library that are about its set-up (no credentials, …).
    """

    def __init__(
        self,
        filesystem: Any,
        *,
        endpoint: str,
        transient_errors: tuple[type[BaseException], ...],
        fatal_errors: tuple[type[BaseException], ...],
        client_errors: tuple[type[BaseException], ...],
    ) -> None:
        self._fs, self.where = filesystem, endpoint
        self._transient, self._fatal, self._client = transient_errors, fatal_errors, client_errors
        self._watched: Any = None
        self._trouble = ""  # what the client library last retried inside a call

    def stat(self, path: str, timeout_s: float) -> tuple[int, float] | None:
        """Size in bytes and mtime (seconds since the epoch) of an object, None when there is none."""
        try:
            found = self._request("head_object", path, timeout_s)
        except FileNotFoundError:
            return None
        return found["ContentLength"], found["LastModified"].timestamp()

    def get(self, path: str, timeout_s: float) -> tuple[bytes, str]:
        """Content and ETag, of one version."""
        return self._read(path, timeout_s)

    def get_range(self, path: str, start: int, length: int, timeout_s: float) -> bytes:
        """At most `length` bytes from `start`."""
        try:
            return self._read(path, timeout_s, Range=f"bytes={start}-{start + length - 1}")[0]
        except OSError as error:
            if _code(error) in ("InvalidRange", "416"):
                return b""  # starts at or behind the end
            raise

    def create(self, path: str, data: bytes, timeout_s: float) -> None:
        """PUT with If-None-Match; raises FileExistsError when the name is taken."""
        try:
            self._s3fs().pipe_file(path, data, mode="create", chunksize=UPLOAD_PART_BYTES, timeout=timeout_s)
        except FileExistsError:
            raise
        except OSError as error:
            if _code(error) in _LOST_RACE:
                raise FileExistsError(path) from error
            raise

    def put(self, path: str, data: bytes, durable: bool = True, *, timeout_s: float) -> None:
        """PUT, over what is there."""
        self._s3fs().pipe_file(
            path, data, chunksize=UPLOAD_PART_BYTES, max_concurrency=PARTS_AT_ONCE, timeout=timeout_s
        )

    def put_if(self, path: str, data: bytes, version: str, timeout_s: float) -> bool:
        """PUT with If-Match; False when the object has another ETag, or is gone."""
        try:
            self._request("put_object", path, timeout_s, Body=data, IfMatch=version)
        except FileNotFoundError as error:
            if not self.missing(error):
                raise
            return False
        except OSError as error:
            if _code(error) in _LOST_RACE:
                return False
            raise
        return True

    def upload(self, path: str, source: Path, timeout_s: float) -> None:
        """PUT a local file, over what is there; large files in parts."""
        self._s3fs().put_file(
            str(source), path, chunksize=UPLOAD_PART_BYTES, max_concurrency=PARTS_AT_ONCE, timeout=timeout_s
        )

    def move(self, path: str, source: Path, timeout_s: float) -> None:
        """`upload`, then remove the local file."""
        self.upload(path, source, timeout_s)
        source.unlink()

    def download(self, path: str, target: Path, timeout_s: float) -> None:
        """Write the object to `target`; large ones by parallel ranges."""
        self._s3fs().get_file(
            path, str(target), chunksize=DOWNLOAD_PART_BYTES, max_concurrency=PARTS_AT_ONCE, timeout=timeout_s
        )

    def find(self, path: str, most: int | None, timeout_s: float) -> list[tuple[str, int, float]]:
        """Path, size and mtime of the objects below `path`, at most `most`, in pages of the store's own listing."""
        bucket, _, key = path.partition("/")
        found: list[tuple[str, int, float]] = []
        page: dict[str, Any] = {}
        while True:
            more = {"ContinuationToken": page["NextContinuationToken"]} if page else {}
            prefix = {"Prefix": key + "/"} if key else {}
            page = self._s3fs().call_s3(
                "list_objects_v2", Bucket=bucket, MaxKeys=LIST_PAGE, timeout=timeout_s, **prefix, **more
            )
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):  # some stores list folders
                    found.append((f"{bucket}/{item['Key']}", item["Size"], item["LastModified"].timestamp()))
            if not page.get("IsTruncated") or (most is not None and len(found) >= most):
                return found[:most]

    def uploads(self, path: str, timeout_s: float) -> list[tuple[str, str, int, float]]:
        """Path, id, bytes so far and time of begin of the multipart uploads below `path` that are not finished."""
        bucket, _, key = path.partition("/")
        found: list[tuple[str, str, int, float]] = []
        page: dict[str, Any] = {}
        while True:
            names = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
            more = {name: page[last] for name, last in names.items() if page.get(last)}
            prefix = {"Prefix": key + "/"} if key else {}
            page = self._s3fs().call_s3(
                "list_multipart_uploads", Bucket=bucket, timeout=timeout_s, **prefix, **more
            )
            for item in page.get("Uploads", []):
                if not key or item["Key"].startswith(key + "/"):
                    name, began = f"{bucket}/{item['Key']}", item["Initiated"].timestamp()
                    size = self._parts_bytes(name, item["UploadId"], timeout_s)
                    found.append((name, item["UploadId"], size, began))
            if not page.get("IsTruncated"):
                return found

    def abort_upload(self, path: str, upload_id: str, timeout_s: float) -> None:
        """Drop a multipart upload and its parts, if it is still there."""
        with contextlib.suppress(FileNotFoundError):
            self._request("abort_multipart_upload", path, timeout_s, UploadId=upload_id)

    def _parts_bytes(self, path: str, upload_id: str, timeout_s: float) -> int:
        total = 0
        page: dict[str, Any] = {"IsTruncated": True, "NextPartNumberMarker": 0}
        while page.get("IsTruncated"):
            more = {"UploadId": upload_id, "PartNumberMarker": int(page["NextPartNumberMarker"])}
            try:
                page = self._request("list_parts", path, timeout_s, **more)
            except FileNotFoundError:  # finished or aborted since the listing
                return total
            total += sum(part["Size"] for part in page.get("Parts", []))
        return total

    def delete(self, path: str, timeout_s: float) -> None:
        """Remove the object, if it is there."""
        try:
            self._request("delete_object", path, timeout_s)
        except FileNotFoundError as error:
            if not self.missing(error):
                raise

    def delete_tree(self, path: str, timeout_s: float) -> None:
        """Remove every object below `path`."""
        bucket = path.partition("/")[0]
        keys = [item[0].partition("/")[2] for item in self.find(path, None, timeout_s)]
        for begin in range(0, len(keys), DELETE_BATCH):
            batch = {"Objects": [{"Key": key} for key in keys[begin : begin + DELETE_BATCH]], "Quiet": True}
            answer = self._s3fs().call_s3("delete_objects", Bucket=bucket, Delete=batch, timeout=timeout_s)
            if failed := answer.get("Errors"):
                # The request succeeds as a whole even where single keys fail.
                raise TimeoutError(f"{len(failed)} objects were not deleted, the first: {failed[0]}")

    def transient(self, error: Exception) -> bool:
        """Whether the same call may succeed a little later."""
        response = _response(error)
        if response is not None:
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return status == 429 or (status >= 500 and status != 501) or _code(error) in _TRANSIENT_CODES
        return isinstance(error, self._transient) and not isinstance(error, self._fatal)

    def missing(self, error: FileNotFoundError) -> bool:
        """Whether the error says that the object is missing, and not its bucket."""
        return _code(error) != "NoSuchBucket"

    def describe(self, error: Exception) -> str:
        """The error in one line; for a call that ran out of time, what went wrong inside it."""
        if isinstance(error, TimeoutError) and _response(error) is None:
            return f"no answer from {self.where} in time" + (
                f"; last seen: {self._trouble}" if self._trouble else ""
            )
        return f"{type(error).__name__}: {error}"

    def explain(self, error: Exception) -> str | None:
        """What a person can do about an error; None for one that is not about storage."""
        code, response = _code(error), _response(error)
        if code == "NoSuchBucket":
            return "create the bucket, or correct its name in the root"
        if code == "RequestTimeTooSkewed":
            return "set this machine's clock (ntp): the store refuses requests signed at another time"
        if code == "NotImplemented":
            return "this store lacks an operation that is needed: use another store or a newer version of it"
        if (
            isinstance(error, PermissionError)
            or code in ("401", "403")
            or "Credential" in type(error).__name__
        ):
            return f"{_CREDENTIALS} that may read and write this bucket at {self.where}"
        if response is not None:
            return f"{self.where} refused the request: check endpoint, region (AWS_REGION) and bucket"
        if isinstance(error, (*self._transient, *self._fatal)):
            return f"check that {self.where} is reachable from here (AWS_ENDPOINT_URL, network, certificates)"
        if isinstance(error, self._client):
            return f"correct the AWS settings (AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE), or {_CREDENTIALS}"
        return None

    def _s3fs(self) -> Any:
        """The file system, connected, with an ear on the retries of the client library."""
        client = self._fs.connect()
        if client is not self._watched:  # s3fs makes a new client when the old one's connections are closed
            client.meta.events.register("needs-retry.s3", self._note)
            self._watched = client
        return self._fs

    def _note(self, response: Any = None, caught_exception: Any = None, **_: Any) -> None:
        if caught_exception is not None:
            self._trouble = f"{type(caught_exception).__name__}: {caught_exception}"
        elif response is not None and response[0].status_code >= 300:
            error = response[1].get("Error", {})
            self._trouble = (
                f"HTTP {response[0].status_code} {error.get('Code', '')}: {error.get('Message', '')}"
            )

    def _request(self, method: str, path: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        bucket, _, key = path.partition("/")
        return self._s3fs().call_s3(method, Bucket=bucket, Key=key, timeout=timeout_s, **arguments)

    def _read(self, path: str, timeout_s: float, **arguments: Any) -> tuple[bytes, str]:
        """Body and ETag of one GET: `cat_file` of s3fs loses the ETag, and asks HEAD first."""
        answer = self._request("get_object", path, timeout_s, **arguments)
        return asyncio.run_coroutine_threadsafe(
            _drain(answer["Body"], timeout_s), self._fs.loop
        ).result(), answer["ETag"]


async def _drain(body: Any, timeout_s: float) -> bytes:
    try:
        return await asyncio.wait_for(body.read(), timeout_s)
    finally:
        body.close()


def _response(error: BaseException) -> dict[str, Any] | None:
    """The store's answer inside a botocore ClientError, or inside the OSError that s3fs made of it."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return response
    return None


def _code(error: BaseException) -> str:
    response = _response(error)
    return str(response.get("Error", {}).get("Code", "")) if response else ""
