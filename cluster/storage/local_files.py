"""Object storage on a local or shared file system: what `cluster.storage` does for bare paths and file://.

Every write goes to a temporary file in the target's folder, is flushed to disk, and appears under its name
whole or not at all, whatever instant the process is killed at. Errors are plain OSErrors here;
`cluster.storage` turns them into errors of ours.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

from cluster.errors import StorageUnavailable
from cluster.hashing import sha256_bytes

TEMPORARY = ".tmp-"  # prefix of names that are never listed: writes in flight, or left by a killed process

# What NFS and other network file systems raise for a while and then not any more; ENOTEMPTY: somebody wrote
# into a folder that is being deleted.
_TRANSIENT = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EINTR,
    errno.EBUSY,
    errno.ENOTEMPTY,
}


class LocalFiles:
    """The store behind absolute local paths."""

    def stat(self, path: str, timeout_s: float) -> tuple[int, float] | None:
        """Size in bytes and mtime (seconds since the epoch) of a file, None when there is none."""
        try:
            found = Path(path).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return None if Path(path).is_dir() else (found.st_size, found.st_mtime)

    def get(self, path: str, timeout_s: float) -> tuple[bytes, str]:
        """Content and version of a file."""
        with _reading(path):
            data = Path(path).read_bytes()
        return data, sha256_bytes(data)

    def get_range(self, path: str, start: int, length: int, timeout_s: float) -> bytes:
        """At most `length` bytes from `start`."""
        with _reading(path), open(path, "rb") as file:
            file.seek(start)
            return file.read(length)

    def create(self, path: str, data: bytes, timeout_s: float) -> None:
        """Create the file; raises FileExistsError when it is there already.

        A hard link publishes the complete file and fails when the name is taken, in one step; `open(…, "xb")`
        would show a half-written file to readers, and leave it for ever when killed.
        """
        target = Path(path)
        with _temporary(target) as temporary:
            _write(temporary, data, durable=True)
            try:
                os.link(temporary, target)
            except OSError as error:
                if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                    raise StorageUnavailable(
                        f"the file system of {target.parent} has no hard links, which exclusive create needs",
                        found=str(error),
                        remedy="choose a root on another file system (ext4, xfs, NFS, …) or an s3:// root",
                    ) from None
                raise
        _sync_folder(target.parent)

    def put(self, path: str, data: bytes, durable: bool = True, *, timeout_s: float) -> None:
        """Write the file, over what is there."""
        target = Path(path)
        with _temporary(target) as temporary:
            _write(temporary, data, durable=durable)
            temporary.replace(target)
        if durable:
            _sync_folder(target.parent)

    def put_if(self, path: str, data: bytes, version: str, timeout_s: float) -> bool:
        """Write the file if its version still is `version`; one step to other callers."""
        # The folder itself carries the lock: no lock file to list, leave behind, or delete under a waiter.
        try:
            descriptor = os.open(Path(path).parent, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                current = Path(path).read_bytes()
            except FileNotFoundError:
                return False
            if sha256_bytes(current) != version:
                return False
            self.put(path, data, timeout_s=timeout_s)
            return True
        finally:
            os.close(descriptor)

    def upload(self, path: str, source: Path, timeout_s: float) -> None:
        """Copy the local file `source` to `path`, over what is there."""
        target = Path(path)
        with _temporary(target) as temporary:
            shutil.copyfile(source, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            temporary.replace(target)
        _sync_folder(target.parent)

    def move(self, path: str, source: Path, timeout_s: float) -> None:
        """Rename the local file `source` to `path`; copy it when it lies on another file system."""
        if not source.exists() and Path(path).exists():
            return  # the first try of a retried call arrived
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(source, "rb") as file:
            os.fsync(file.fileno())
        try:
            source.replace(path)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            self.upload(path, source, timeout_s)
            source.unlink()
        _sync_folder(Path(path).parent)

    def download(self, path: str, target: Path, timeout_s: float) -> None:
        """Copy the file to `target`."""
        with _reading(path):
            shutil.copyfile(path, target)

    def find(self, path: str, most: int | None, timeout_s: float) -> list[tuple[str, int, float]]:
        """Path, size and mtime of the files below the folder `path`, at most `most`; nothing without the folder."""
        return list(islice(_walk(path), most))

    def uploads(self, path: str, timeout_s: float) -> list[tuple[str, str, int, float]]:
        """Path, id (none), size and mtime of what killed writers left below the folder, or others are writing."""
        return [(name, "", size, mtime) for name, size, mtime in _walk(path, temporary=True)]

    def abort_upload(self, path: str, upload_id: str, timeout_s: float) -> None:
        """Remove what `uploads` listed, if it is still there."""
        Path(path).unlink(missing_ok=True)

    def delete(self, path: str, timeout_s: float) -> None:
        """Remove the file, if it is there."""
        Path(path).unlink(missing_ok=True)

    def delete_tree(self, path: str, timeout_s: float) -> None:
        """Remove the folder and everything below it, if it is there."""
        with suppress(FileNotFoundError, NotADirectoryError):
            shutil.rmtree(path)

    def transient(self, error: Exception) -> bool:
        """Whether the same call may succeed a little later."""
        return isinstance(error, OSError) and error.errno in _TRANSIENT

    def missing(self, error: FileNotFoundError) -> bool:
        """Whether the error says that the object is missing, and not what should contain it."""
        return True

    def describe(self, error: Exception) -> str:
        """The error in one line."""
        return str(error)

    def explain(self, error: Exception) -> str | None:
        """What a person can do about an OSError; None for an error that is not about storage."""
        if not isinstance(error, OSError):
            return None
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            return "choose a folder that this user may write, or correct its permissions"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return "free some space on that file system, or choose another root"
        if isinstance(error, IsADirectoryError | NotADirectoryError):
            return "a file stands where a folder is needed, or the other way round: choose another path"
        return "check that the file system is mounted and well"


def _walk(path: str, temporary: bool = False) -> Iterator[tuple[str, int, float]]:
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.is_dir():
            yield from _walk(entry.path, temporary)
        elif entry.name.startswith(TEMPORARY) == temporary:
            try:
                found = entry.stat()
            except FileNotFoundError:
                continue  # deleted since the scan, or a dangling link
            yield entry.path, found.st_size, found.st_mtime


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except (IsADirectoryError, NotADirectoryError):
        # Objects have no folders: what is only a folder, or below a file, is not there.
        raise FileNotFoundError(errno.ENOENT, "no such file", path) from None


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError):  # must not read as "the object is (not) there"
        raise NotADirectoryError(errno.ENOTDIR, "cannot make this folder", str(path.parent)) from None
    temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        yield temporary
    except FileNotFoundError as error:
        if str(error.filename) == str(
            temporary
        ):  # its folder was deleted since: writing again makes it again
            raise OSError(errno.EAGAIN, "the folder was deleted meanwhile", str(path.parent)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, data: bytes, *, durable: bool) -> None:
    with open(path, "xb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a new name in `folder` survive a power cut."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return  # somebody deleted it since, and the name with it
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)
