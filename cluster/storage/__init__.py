"""All access to object storage: local and shared folders (bare paths, file://) and S3-compatible stores (s3://).

Callers write `from cluster import storage` and use the names below; the files here have one subject each:

    uris       the one form of a URI                    reading    look up, read, list
    stores     which store a URI belongs to             writing    create, replace, delete
    calls      retries, and errors of ours              files      to and from local files
    documents  JSON: records and telemetry              uploads    what was begun and never finished
    probe      whether a store keeps preconditions
    local_files, s3_objects, foreign                    the stores; one attempt for each call

Any other protocol that fsspec speaks (https://, gs://, hf://, memory://, …) is read only: `exists`, `size`, the
`read_` functions, `open_read`, `list_files`, `download_file` and `download_tree`.

The rules that every function keeps:
- An object appears whole or not at all; nothing that raises half-way publishes anything.
- Nothing depends on rename, on folders, or on a cached listing.
- Every call is retried with jitter until a deadline (ITPN_STORAGE_DEADLINE_S, 180 s), then raises
  StorageUnavailable; a refusal that no retry can change (credentials, missing bucket) raises it at once.
- Clients are made in the process that uses them, never inherited over a fork.

S3 credentials, endpoint and region come from the standard AWS_* variables, files and roles.
"""

from cluster.hashing import canonical_json, sha256_bytes, sha256_file
from cluster.storage.documents import read_json, write_json_exclusive, write_telemetry
from cluster.storage.files import download_file, download_tree, move_file, upload_file, upload_tree
from cluster.storage.probe import probe_preconditions
from cluster.storage.reading import (
    ObjectInfo,
    exists,
    list_files,
    open_read,
    read_bytes,
    read_range,
    read_versioned,
    size,
)
from cluster.storage.uploads import Upload, abort_upload, list_uploads
from cluster.storage.uris import join
from cluster.storage.writing import delete, delete_tree, overwrite, replace_if, write_exclusive

__all__ = [
    "join",
    # read
    "ObjectInfo",
    "exists",
    "list_files",
    "open_read",
    "read_bytes",
    "read_json",
    "read_range",
    "read_versioned",
    "size",
    # write
    "delete",
    "delete_tree",
    "overwrite",
    "replace_if",
    "write_exclusive",
    "write_json_exclusive",
    "write_telemetry",
    # local files
    "download_file",
    "download_tree",
    "move_file",
    "upload_file",
    "upload_tree",
    # unfinished uploads
    "Upload",
    "abort_upload",
    "list_uploads",
    # hashes, as records keep them
    "canonical_json",
    "sha256_bytes",
    "sha256_file",
    "probe_preconditions",
]
