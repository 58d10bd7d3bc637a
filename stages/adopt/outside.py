"""What a weights file from outside is: its hash, and the config beside it or read off its shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster import storage
from stages.artifacts import CheckpointRef
from stages.model.files import local_copy
from stages.model.infer import infer_config
from stages.model.io import CONFIG, WEIGHTS, config_beside, read_described
from stages.model.places import beside, is_weights_file


@dataclass(frozen=True)
class Outside:
    """A weights file: `config` is what our `config.json` would say of it, `config_sha256` that of one beside it."""

    uri: str
    sha256: str
    bytes: int
    config: dict[str, Any]
    config_sha256: str | None = None

    def reference(self) -> CheckpointRef:
        """The file as a stage's input; of its training nothing is known."""
        return CheckpointRef(
            uri=self.uri,
            sha256=self.sha256,
            bytes=self.bytes,
            step=0,
            task="classify" if self.config["kind"] == "classifier" else "pretrain",
            dataset="unknown",
            data_fingerprint="unknown",
            seed=0,
            init="pretrained",
        )


def weights_file(uri: str) -> str | None:
    """URI of the weights that `uri` names, a file or a folder with `model.safetensors`; None where there are none."""
    full = storage.join(uri)
    if not is_weights_file(full):
        full = storage.join(full, WEIGHTS)
    return full if storage.exists(full) else None


def examine(uri: str, *, ema: bool = False) -> Outside:
    """Read a weights file.

    Args:
        uri: the file itself, as `weights_file` gives it.
        ema: what matters are the averaged weights of a published checkpoint.

    Raises DataInvalid when it is missing, broken, or no model that we know.
    """
    with local_copy(uri) as path:
        sha256, size = storage.sha256_file(path), path.stat().st_size
        state, config = read_described(uri, path, ema=ema)
        config = config or infer_config(state)
    return Outside(storage.join(uri), sha256, size, config, config_sha256(uri))


def config_sha256(weights: str) -> str | None:
    """sha256 of the `config.json` that says what model a weights file is of; None where none lies beside it."""
    if config_beside(weights) is None:
        return None
    return storage.sha256_bytes(storage.read_bytes(beside(weights, CONFIG)))
