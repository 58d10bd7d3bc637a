"""Config of taking in a checkpoint that another graph, or somebody else, made."""

from __future__ import annotations

from stages.artifacts import CheckpointRef
from stages.config import Config, not_identity


class AdoptConfig(Config):
    """A checkpoint from outside. It is what its bytes are: hashes are its identity, where it lies is not.

    `uri` names a weights file: our `model.safetensors` with `config.json` beside it (pinned by `config_sha256`), or a
    published file (`.pt`, `.pth`, `.bin`, `.safetensors`), of which `ema` takes the averaged weights. `classes` names
    the classes of a published classifier in the order of its head (pinned by `classes_sha256`; see
    stages/data/class_names.py), so that fine-tuning takes over its head's rows by name.
    """

    uri: str = not_identity("")
    sha256: str | None = None
    config_sha256: str | None = None
    classes: str = not_identity("")
    classes_sha256: str | None = None
    ema: bool = False
    known: CheckpointRef | None = not_identity(None)  # what a registry says of it; kept as its lineage


class LastConfig(Config):
    """The last weights of a fine-tuning that handed on averaged ones; nothing is to choose."""
