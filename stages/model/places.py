"""Which file of weights a path or URI names, and what lies beside it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from cluster import storage

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
INDEX_SUFFIX = ".safetensors.index.json"  # of weights in several files
_WEB = ("http://", "https://")


def file_name(uri: Path | str) -> str:
    """Last part of a path or URI. The query of a web address (`…/file.pth?download=1`) is no part of it."""
    uri = str(uri)
    path = urlsplit(uri).path if uri.startswith(_WEB) else uri
    return path.rstrip("/").rsplit("/", 1)[-1]


def is_weights_file(uri: str) -> bool:
    """Whether a path or URI names a weights file by its suffix; others are folders."""
    return file_name(uri).endswith(SUFFIXES)


def is_index(uri: Path | str) -> bool:
    """Whether a path or URI names the index of weights in several files."""
    return file_name(uri).endswith(INDEX_SUFFIX)


def beside(uri: str, name: str) -> str:
    """URI of another file in the folder of the file at `uri`; a query is left out."""
    full = storage.join(uri)
    if full.startswith(_WEB):
        full = urlsplit(full)._replace(query="", fragment="").geturl()
    return storage.join(full.rsplit("/", 1)[0], name)
