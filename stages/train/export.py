"""From a committed training checkpoint to the files that a stage hands on."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster import scratch, storage
from cluster.errors import DataInvalid
from stages.artifacts import FileInfo
from stages.model import save_model
from stages.train import state
from stages.train.checkpoint import opener
from stages.train.layout import manifest_uri


def export_model(
    module: nn.Module, description: dict[str, Any], result: dict[str, Any], *, out: str, files: str, ema: bool
) -> dict[str, Any]:
    """Write the consolidated model of the run's last checkpoint, and the run's metrics, under `files`.

    Args:
        module: gives names and shapes; its weights are not read.
        description: the model's config for config.json.
        result: what `Trainer.train` returned.
        out, files: URIs of the step's output folder and of this attempt's files in it.
        ema: export the averaged weights; the last ones go to `raw/` beside them.

    Returns `{"files": [FileInfo as dict, …], "model": its FileInfo}`, paths relative to `out`.
    Raises DataInvalid when the export and the module do not have the same parameters.
    """
    shapes = {name: torch.Size(shape) for name, shape in result["shapes"].items()}
    manifest = storage.read_json(manifest_uri(out, result["step"]))
    names = [info["path"].rsplit("/", 1)[1] for info in manifest["files"]]
    prefix = files.removeprefix(storage.join(out) + "/")
    infos: list[FileInfo] = []
    with tempfile.TemporaryDirectory(prefix="export-", dir=scratch.folder()) as temporary:
        folder = Path(temporary)
        open_file = opener(out, manifest, folder / "in")
        for kind, where in (("ema", ""), ("master", "raw/")) if ema else (("master", ""),):
            weights = state.consolidate(names, open_file, shapes, kind=kind)
            _check(module, weights)
            save_model(folder / "out" / where, weights, description)
        (folder / "out" / "metrics.jsonl").write_bytes(
            b"".join(storage.read_bytes(storage.join(out, info["path"])) for info in result["metrics"])
        )
        for path, size, sha256 in storage.upload_tree(folder / "out", files):
            infos.append(FileInfo(path=f"{prefix}/{path}", bytes=size, sha256=sha256))
    model = next(info for info in infos if info.path == f"{prefix}/model.safetensors")
    return {"files": [info.model_dump() for info in infos], "model": model.model_dump()}


def _check(module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    expected, found = set(module.state_dict()), set(weights)
    if expected != found:
        raise DataInvalid(
            "the checkpoint is of another model",
            expected=f"without {sorted(found - expected)[:3]}, with {sorted(expected - found)[:3]}",
            remedy="use the config that the run was started with",
        )
