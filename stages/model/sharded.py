"""Weights in several safetensors files beside an index, the layout in which Hugging Face keeps large models.

`model.safetensors.index.json` says in which file each tensor lies. It holds no hashes, so such weights are pinned by
one sha256 over all files: that of the lines `sha256sum` prints for them, in order of their names
(`sha256sum model-*.safetensors | sha256sum` in their folder).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from cluster import storage
from cluster.errors import DataInvalid
from cluster.hashing import sha256_bytes
from stages.model.places import beside, file_name, is_index


def weight_map(index: Path) -> dict[str, str]:
    """Tensor → file, of a local index; raises DataInvalid when it is none, or names a file outside its folder."""
    try:
        content: Any = json.loads(index.read_bytes())
        found = dict(content["weight_map"])
    except (ValueError, KeyError, TypeError):
        found = {}
    names = list(found.values())
    if not names or not all(isinstance(name, str) and _is_plain(name) for name in names):
        raise DataInvalid(
            f"{index} is no index of weights in several files",
            expected="`weight_map`: each tensor's file, a safetensors file in the same folder",
            found=", ".join(sorted({str(name) for name in names}))[:200] or "no weight_map",
            remedy="fetch the index again, from where the weights are",
        )
    return found


def _is_plain(name: str) -> bool:
    return name == Path(name).name and name.endswith(".safetensors") and "\\" not in name


def files_of(index: Path) -> list[str]:
    """Names of the files that a local index names, in order."""
    return sorted(set(weight_map(index).values()))


def fetch(uri: str, folder: Path) -> Path:
    """Copy an index and its files into a local folder; the index's path. Raises NotFound, DataInvalid."""
    index = folder / file_name(uri)
    storage.download_file(uri, index)
    for file in files_of(index):
        storage.download_file(beside(uri, file), folder / file)
    return index


def check(index: Path) -> None:
    """Raise DataInvalid unless every file beside the index is there, whole, and holds what the index says."""
    wanted = weight_map(index)
    for file in files_of(index):
        path = index.parent / file
        if not path.is_file():
            raise DataInvalid(
                f"{path} is missing",
                expected=f"every file that {index.name} names",
                found="no such file",
                remedy="fetch it from where the other files came from",
            )
        expected = {tensor for tensor, name in wanted.items() if name == file}
        try:
            with safe_open(path, "pt") as tensors:  # reads the header, and compares it with the file's size
                found = set(tensors.keys())
        except SafetensorError as error:
            raise DataInvalid(
                f"{path} cannot be read", expected="a whole safetensors file", found=str(error)[:200],
                remedy="fetch it again",
            ) from None  # fmt: skip
        if found != expected:
            raise DataInvalid(
                f"{path} is not the file that {index.name} speaks of",
                expected=f"{len(expected)} tensors",
                found=f"without {sorted(expected - found)[:4]}, with {sorted(found - expected)[:4]}",
                remedy="fetch index and files from one place, of one version",
            )


def sha256_of(path: Path) -> str:
    """The sha256 that pins a local weights file; of an index, the one over its files that the module describes."""
    if not is_index(path):
        return storage.sha256_file(path)
    lines = (f"{storage.sha256_file(path.parent / file)}  {file}\n" for file in files_of(path))
    return sha256_bytes("".join(lines).encode())


def read(index: Path) -> dict[str, Tensor]:
    """All tensors by name, on the CPU."""
    return {name: value for file in files_of(index) for name, value in load_file(index.parent / file).items()}
