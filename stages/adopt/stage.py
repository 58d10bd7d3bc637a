"""Bring weights into a graph as a checkpoint of its own: from outside, or the last ones beside the averaged ones.

Either way the result lies whole under the step's own output (model.safetensors, config.json), so that what
comes after depends on nothing that somebody may move or delete.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster import scratch, storage
from cluster.errors import ConfigError, DataInvalid
from stages.adopt.config import AdoptConfig, LastConfig
from stages.artifacts import Artifact, CheckpointRef, FileInfo, Outcome
from stages.context import StageContext

WEIGHTS = "model.safetensors"


def run(config: AdoptConfig, inputs: Mapping[str, Artifact], context: StageContext) -> Outcome:
    """Verify a checkpoint from outside, load it, and write it in our layout.

    Raises:
        ConfigError: no file, or no sha256, was given; or the class names are not those of its head.
        DataInvalid: a file is missing, another one than pinned, or not weights of a model that we know.
    """
    from stages.adopt.outside import Outside
    from stages.model import load_into, save_model
    from stages.model.export import describe
    from stages.model.files import local_copy
    from stages.model.infer import infer_config, some
    from stages.model.io import build, read_described

    refuse_unpinned(config)
    assert config.sha256 is not None
    with local_copy(config.uri, sha256=config.sha256) as path:
        state, own = read_described(config.uri, path, ema=config.ema)
    model = build(own or infer_config(state))
    report = load_into(model, state, allow_missing=())
    if config.classes:
        _name_classes(model, config)
    description = describe(model)
    with tempfile.TemporaryDirectory(prefix="adopt-", dir=scratch.folder()) as folder:
        save_model(folder, model.state_dict(), description)
        files = _upload(Path(folder), context)
    known = config.known or Outside(config.uri, config.sha256, 0, description).reference()
    size = sum(value.numel() for value in model.state_dict().values()) / 1e6
    notes = [f"{description['kind']} of {size:.1f} M values from {config.uri}, sha256 {config.sha256}"]
    if report.dropped:  # of pre-training, say, without the rest of it
        notes.append(f"left out, since a {description['kind']} has no place for it: {some(report.dropped)}")
    return Outcome(artifact=_at(known, files, context), files=files, notes=notes)


def refuse_unpinned(config: AdoptConfig, name: str = "NAME") -> None:
    """Raise ConfigError for a checkpoint that is not pinned whole, DataInvalid for another config than pinned.

    `name` is what the recipe calls the checkpoint, for the remedy.
    """
    from stages.adopt.outside import config_sha256

    found_out = "itpn finetune and itpn evaluate find it out; else"
    given = f"uri {config.uri or 'none'}, sha256 {config.sha256 or 'none'}"
    if not config.uri or not config.sha256:
        raise ConfigError(
            "the checkpoint is not named whole: it is what its bytes are",
            expected="uri and sha256",
            found=given,
            remedy=f"{found_out} --set checkpoints.{name}.sha256=… (what `sha256sum FILE` prints)",
        )
    if config.classes and not config.classes_sha256:
        raise ConfigError(
            f"the file of class names {config.classes} is not pinned",
            expected="its sha256",
            found="none",
            remedy=f"{found_out} --set checkpoints.{name}.classes_sha256=… (what `sha256sum FILE` prints)",
        )
    beside = config_sha256(config.uri)
    if beside == config.config_sha256:
        return
    if config.config_sha256 is None:
        raise ConfigError(
            f"the config.json beside {config.uri} is not pinned, and it decides what the weights mean",
            expected="its sha256",
            found="none",
            remedy=f"{found_out} --set checkpoints.{name}.config_sha256={beside}",
        )
    raise DataInvalid(
        f"the config.json beside {config.uri} is not the one that was pinned",
        expected=f"sha256 {config.config_sha256}",
        found=f"sha256 {beside}" if beside else "none",
        remedy="bring it back, or take the checkpoint in anew under a new version",
    )


def _name_classes(model: Any, config: AdoptConfig) -> None:
    """Give a classifier the names of its file; raises ConfigError when it has others, or is none."""
    from stages.data.class_names import read_class_names

    rows = getattr(model, "num_classes", 0)
    if not rows:
        raise ConfigError(
            f"{config.uri} has no classes to name", expected="a classifier", remedy="leave out `classes`"
        )
    names = tuple(read_class_names(config.classes, rows, config.classes_sha256))
    if model.classes not in (None, names):
        differing = next(
            i for i, (own, other) in enumerate(zip(model.classes, names, strict=True)) if own != other
        )
        raise ConfigError(
            f"{config.classes} names other classes than the checkpoint's own config.json",
            expected=f"class {differing} is {model.classes[differing]}",
            found=names[differing],
            remedy="leave out `classes`",
        )
    model.classes = names


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
    with tempfile.TemporaryDirectory(prefix="last-", dir=scratch.folder()) as folder:
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
