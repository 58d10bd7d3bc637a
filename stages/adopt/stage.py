"""Bring weights into a graph as a checkpoint of its own: from outside, or the last ones beside the averaged ones.

Either way the result lies whole under the step's own output (model.safetensors, config.json), so that what
comes after depends on nothing that somebody may move or delete.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from cluster import storage
from cluster.errors import ConfigError, DataInvalid
from stages.adopt.config import AdoptConfig, LastConfig
from stages.artifacts import Artifact, CheckpointRef, FileInfo, Outcome
from stages.context import StageContext

WEIGHTS = "model.safetensors"


def run(config: AdoptConfig, inputs: Mapping[str, Artifact], context: StageContext) -> Outcome:
    """Verify a checkpoint from outside, load it, and write it in our layout.

    Raises:
        ConfigError: no file, or no sha256, was given.
        DataInvalid: the file is missing, another one than pinned, or not weights of a model that we know.
    """
    from stages.adopt.outside import Outside
    from stages.model import load_into, save_model
    from stages.model.export import describe
    from stages.model.files import local_copy
    from stages.model.infer import infer_config, some
    from stages.model.io import build, read_described

    if not config.uri or not config.sha256:
        raise ConfigError(
            "the checkpoint is not named whole",
            expected="uri and sha256",
            found=f"uri {config.uri or 'none'}, sha256 {config.sha256 or 'none'}",
            remedy="itpn finetune and itpn evaluate find out the sha256; or give what `sha256sum FILE` prints",
        )
    with local_copy(config.uri, sha256=config.sha256) as path:
        state, own = read_described(config.uri, path, ema=config.ema)
    model = build(own or infer_config(state))
    report = load_into(model, state, allow_missing=())
    description = describe(model)
    with tempfile.TemporaryDirectory(prefix="itpn-adopt-") as folder:
        save_model(folder, model.state_dict(), description)
        files = _upload(Path(folder), context)
    known = config.known or Outside(config.uri, config.sha256, 0, description).reference()
    size = sum(value.numel() for value in model.state_dict().values()) / 1e6
    notes = [f"{description['kind']} of {size:.1f} M values from {config.uri}, sha256 {config.sha256}"]
    if report.dropped:  # of pre-training, say, without the rest of it
        notes.append(f"left out, since a {description['kind']} has no place for it: {some(report.dropped)}")
    return Outcome(artifact=_at(known, files, context), files=files, notes=notes)


def run_last(config: LastConfig, inputs: Mapping[str, Artifact], context: StageContext) -> Outcome:
    """Take the last weights of the fine-tuning `checkpoint`, which lie in `raw/` beside the averaged ones.

    Raises:
        ConfigError: the input is no checkpoint.
        DataInvalid: there are none, since the fine-tuning kept no average.
    """
    source = inputs.get("checkpoint")
    if not isinstance(source, CheckpointRef):
        raise ConfigError(
            "the input 'checkpoint' is missing", expected="a fine-tuning with ema_decay above 0"
        )
    raw = storage.join(source.uri.rsplit("/", 1)[0], "raw")
    if not storage.exists(storage.join(raw, WEIGHTS)):
        raise DataInvalid(
            f"{source.uri} has no last weights beside it",
            expected=f"{raw}/{WEIGHTS}",
            remedy="fine-tune with ema_decay above 0; without it the weights handed on are the last ones",
        )
    with tempfile.TemporaryDirectory(prefix="itpn-last-") as folder:
        for name in (WEIGHTS, "config.json"):
            storage.download_file(storage.join(raw, name), Path(folder) / name)
        files = _upload(Path(folder), context)
    return Outcome(artifact=_at(source, files, context), files=files)


def _upload(folder: Path, context: StageContext) -> list[FileInfo]:
    prefix = context.files.removeprefix(storage.join(context.out) + "/")
    return [
        FileInfo(path=f"{prefix}/{path}", bytes=size, sha256=sha256)
        for path, size, sha256 in storage.upload_tree(folder, context.files)
    ]


def _at(lineage: CheckpointRef, files: list[FileInfo], context: StageContext) -> CheckpointRef:
    """The same checkpoint's lineage with the place, size and hash of the copy."""
    weights = next(info for info in files if info.path.endswith("/" + WEIGHTS))
    place = {"uri": storage.join(context.out, weights.path), "sha256": weights.sha256, "bytes": weights.bytes}
    return lineage.model_copy(update=place)
