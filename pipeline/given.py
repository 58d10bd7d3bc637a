"""The checkpoint and the data that a person names: files, or what the root's registry knows."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from cluster import storage
from cluster.errors import ConfigError, ItpnError
from pipeline.recipes._downstream import FromCheckpoints
from pipeline.recipes._imagenet import IMAGENET
from pipeline.record import Record
from pipeline.registry import Registry
from pipeline.registry.lineage import find, read_record
from stages.adopt.config import AdoptConfig
from stages.adopt.outside import examine, weights_file
from stages.data.class_names import read_class_names
from stages.model.config import BackboneConfig, sizes
from stages.shard.config import ShardConfig

AnyRecipe = TypeVar("AnyRecipe", bound=FromCheckpoints)
# What of a backbone follows from its weights; the rest (drop path, migration, …) is the recipe's.
SHAPE = (
    "family", "embed_dim", "depths", "num_heads", "mlp_ratio", "bridge_mlp_ratio", "init_values", "norm_eps",
)  # fmt: skip


class Given:
    """The checkpoint that was named: what it is, and, where the registry knows it, how it was made."""

    def __init__(self, root: str, text: str, ema: bool, classes: str = "") -> None:
        if not text:
            raise ConfigError(
                "no checkpoint was given",
                expected="a weights file, an alias, a step, or the start of a sha256",
                remedy="CHECKPOINT=… with make",
            )
        weights, known = weights_file(text), None
        if weights is None:
            try:
                row = find(Registry(root), text)
            except ItpnError as error:
                raise ConfigError(
                    f"'{text}' is neither a weights file nor a checkpoint of {root}",
                    expected="a file (.safetensors, .pth, …) or a folder with model.safetensors; or an alias, a "
                    "step, or at least 6 digits of a sha256",
                    found=error.message,
                    remedy=error.remedy or f"itpn checkpoints list --root {root}",
                ) from None
            weights, known = row.checkpoint.uri, row.checkpoint
        found = examine(weights, ema=ema)
        self.kind: str = found.config["kind"]
        self.config = AdoptConfig(
            uri=found.uri, sha256=found.sha256, config_sha256=found.config_sha256, ema=ema, known=known
        )
        self.backbone = BackboneConfig.parse(found.config["backbone"])
        self.size = next((name for name, size in sizes.items() if _same(size, self.backbone)), None)
        self.record: Record | None = read_record(root, row.step) if known else None
        stem = (self.size or "model").replace("fast_itpn_", "")
        # Whatever decides the import is in its name: another reading of the file is another step, not a drifted one.
        self.name = f"{stem}-{found.sha256[:8]}" + ("-ema" if ema else "")
        if found.config_sha256:
            self.name += f"-config-{found.config_sha256[:8]}"
        if classes:
            digest = _classes_sha256(classes, found.config.get("num_classes", 0))
            self.config = self.config.model_copy(update={"classes": classes, "classes_sha256": digest})
            self.name += f"-classes-{digest[:8]}"


def about(config: AnyRecipe, root: str, given: Given, data: str) -> AnyRecipe:
    """The recipe's config for this checkpoint and these data."""
    shard, version = _data(root, given, data)
    update: dict[str, Any] = {"checkpoints": {given.name: given.config}, "data": shard}
    update |= {"data_version": version} if version else {}
    return config.model_copy(update=update)


def _classes_sha256(uri: str, rows: int) -> str:
    """sha256 of a file of class names; raises ConfigError or DataInvalid when it does not name `rows` classes."""
    if not rows:
        raise ConfigError(
            "the checkpoint has no classes to name", expected="a classifier", remedy="leave out --classes"
        )
    read_class_names(uri, rows)
    return storage.sha256_bytes(storage.read_bytes(uri))


def _data(root: str, given: Given, text: str) -> tuple[ShardConfig, str]:
    """The data set's config and its version, empty for the recipe's own: a finished step's, or new from images."""
    used = given.record.inputs.get("data") if given.record else None
    step = text if re.fullmatch(r"shard/[^/]+/[^/]+", text) else used.step if used and not text else ""
    if step:
        return ShardConfig.parse(read_record(root, step).config), step.split("/")[2]
    name = re.sub(r"\W+", "-", text.rstrip("/").rsplit("/", 1)[-1].split(".")[0]).strip("-").lower()
    if (
        not text
        or name.startswith("ilsvrc2012")
        or name in ("imagenet", "imagenet-1k", "imagenet1k", "imagenet_1k")
    ):
        return IMAGENET.model_copy(update={"source": text}), ""
    return ShardConfig(name=name, source=text), ""


def _same(one: BackboneConfig, other: BackboneConfig) -> bool:
    return all(getattr(one, field) == getattr(other, field) for field in ("family", "embed_dim", "depths"))
