"""Weight files, read without running pickled code: safetensors, torch state dicts, TorchScript archives."""

from __future__ import annotations

import argparse
import json
import pathlib
import pickle
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cluster import scratch, storage
from cluster.errors import ConfigError, DataInvalid
from stages.model import sharded
from stages.model.config import SHA256
from stages.model.places import file_name, is_index


class _Ignored:
    """Stands for a numpy value beside the weights (a best accuracy, a loss): nothing of numpy runs, nothing is kept."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Published checkpoints carry their command line and results beside the weights. These classes only hold values.
_INERT: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    (_Ignored, "numpy.dtype"),
    (_Ignored, "numpy.core.multiarray.scalar"),
    (_Ignored, "numpy._core.multiarray.scalar"),
]
OWN_CONFIG = "itpn_config"  # entry of a torch file that we wrote: what config.json says, as JSON
_STATE_KEYS = ("model", "module", "state_dict")
_EMA_KEYS = ("model_ema", "ema", "state_dict_ema")


@contextmanager
def local_copy(uri: str, *, sha256: str | None = None) -> Iterator[Path]:
    """A local path to the object at `uri`, downloaded to a temporary folder where it is not local.

    With the index of weights in several files (`stages.model.sharded`) these lie beside it, each of them checked.

    Raises:
        ConfigError: `sha256` is none.
        DataInvalid: there is no such file, or its hash is not `sha256`.
    """
    full = storage.join(uri)
    sha256 = pin(sha256)
    with tempfile.TemporaryDirectory(prefix="weights-", dir=scratch.folder()) as folder:
        if "://" not in full:
            local = Path(full)
            if not local.is_file():
                raise DataInvalid(
                    f"no weights file at {full}",
                    expected="a file",
                    found="nothing",
                    remedy="correct the path",
                )
        elif is_index(full):
            local = sharded.fetch(full, Path(folder))
        else:
            local = Path(folder) / file_name(full)
            storage.download_file(full, local)
        if is_index(local):
            sharded.check(local)
        if sha256 is not None and (found := sharded.sha256_of(local)) != sha256:
            raise _differs(full, sha256, found)
        yield local


def pin(sha256: str | None) -> str | None:
    """A sha256 as we compare it, in lower case; raises ConfigError when it is none."""
    if sha256 is not None and not SHA256.fullmatch(sha256.lower()):
        raise ConfigError(
            f"'{sha256}' is no sha256",
            expected="64 hexadecimal digits",
            found=f"{len(sha256)} characters",
            remedy="give what `sha256sum FILE` prints",
        )
    return sha256 and sha256.lower()


def _differs(uri: str, expected: str, found: str) -> DataInvalid:
    return DataInvalid(
        f"{uri} is not the file that was pinned",
        expected=f"sha256 {expected}",
        found=f"sha256 {found}",
        remedy="fetch the pinned file again, or pin the sha256 of this one",
    )


def read_state(path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU; see `read_file`."""
    return read_file(path, ema=ema)[0]


def read_file(path: Path, *, ema: bool = False) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a weights file by name, on the CPU, and the config that it holds itself, if it does.

    Understands safetensors (also several files, by their index), torch files (a state dict, or one under `model`,
    `module` or `state_dict`; with `ema` under `model_ema`), and TorchScript archives. Nothing in the file is executed.

    Raises:
        DataInvalid: not such a file, one that would need to run code, or one without averaged weights when
            those are asked for.
    """
    try:
        content, nested = _parse(path)
    except OSError:
        raise
    except Exception as error:  # a broken or hostile file makes the parsers raise nearly anything
        raise DataInvalid(
            f"{path} cannot be read as weights",
            expected="safetensors, a torch state dict, or a TorchScript archive",
            found=(str(error).splitlines() or [type(error).__name__])[0][:300],
            remedy="convert the file to safetensors on a machine that trusts it",
        ) from None
    if not isinstance(content, dict):
        raise DataInvalid(
            f"{path} holds no state dict", expected="tensors by name", found=type(content).__name__
        )
    own = _own_config(path, content.get(OWN_CONFIG)) if nested else None
    keys = _EMA_KEYS if ema else _STATE_KEYS
    key = next((key for key in keys if nested and isinstance(content.get(key), dict)), None)
    if key is None and ema:
        raise DataInvalid(
            f"{path} holds no averaged weights", expected=" or ".join(keys), found=_names(content)
        )
    content = content if key is None else content[key]
    state = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise DataInvalid(f"{path} holds no tensors", expected="a state dict", found=_names(content))
    if all(name.startswith("module.") for name in state):  # saved from a DistributedDataParallel wrapper
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state, own


def _parse(path: Path) -> tuple[Any, bool]:
    """The file's content, and whether it may hold more than tensors."""
    if is_index(path):
        return sharded.read(path), False
    if path.suffix == ".safetensors":
        return load_file(path), False
    if is_torchscript(path):
        return _read_torchscript(path), False
    with torch.serialization.safe_globals(_INERT):
        return torch.load(path, map_location="cpu", weights_only=True), True


def _own_config(path: Path, text: Any) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise DataInvalid(
            f"{path}: its entry {OWN_CONFIG} cannot be read",
            expected="JSON of a model's config",
            found=str(error),
        ) from None


def _names(content: dict[Any, Any]) -> str:
    return ", ".join(map(str, list(content)[:8])) or "nothing"


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of a TorchScript archive, by their dotted names.

    `torch.jit.load` would compile the code inside; this reads `data.pkl` with an unpickler that knows tensors
    and turns every scripted module into a plain dictionary.
    """
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if not pickles:
            raise pickle.UnpicklingError("a TorchScript archive without its data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        with archive.open(f"{root}data.pkl") as file:
            module = _TensorUnpickler(file, archive, root).load()
    state: dict[str, Tensor] = {}
    _collect(module, "", state)
    return state


class _Module:
    """Stands for any scripted module: keeps its attributes, runs nothing."""

    attributes: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self._archive, self._root = archive, root
        self._storages: dict[str, torch.UntypedStorage] = {}
        # A pickle can set attributes on whatever it names, so it gets a class and functions of its own: what it
        # does to them ends with this load.
        self._module = type("Module", (_Module,), {})
        self._rebuild = lambda *arguments: torch._utils._rebuild_tensor_v2(*arguments)
        self._mapping = type("Mapping", (OrderedDict,), {})

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return self._module
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return self._mapping
        if module == "torch.jit._pickle":  # typed lists and the like: their items
            return lambda data, *_: data
        raise pickle.UnpicklingError(f"the archive asks for {module}.{name}, which is not a tensor")

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, _, count = pid
        if key not in self._storages:
            data = bytearray(self._archive.read(f"{self._root}data/{key}"))
            if len(data) < count * dtype.itemsize:
                raise pickle.UnpicklingError(f"storage {key} is cut short")
            self._storages[key] = torch.frombuffer(data, dtype=torch.uint8).untyped_storage()
        return torch.storage.TypedStorage(wrap_storage=self._storages[key], dtype=dtype, _internal=True)


def _collect(value: Any, prefix: str, state: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        state[prefix] = value.detach()
    elif isinstance(value, _Module):
        for name, item in value.attributes.items():
            _collect(item, f"{prefix}.{name}" if prefix else name, state)
