"""What the evaluators of one checkpoint share: weights, data, one pass for all that look at the same predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cluster import storage
from cluster.distributed import World
from stages.context import Progress
from stages.data import augment
from stages.data.class_names import read_class_names
from stages.data.dataset import ShardDataset
from stages.data.device import on_device
from stages.data.feed import EvalFeed
from stages.evaluate.config import Classification, EvaluateConfig, Evaluator, Knn, Linear, OnData, Real
from stages.evaluate.features import Features, collect
from stages.evaluate.setting import Setting, Weights, setting_of


class Workbench:
    """One rank's part of an evaluation.

    Args:
        weights: of the checkpoint.
        data: the data set's reference, as a dictionary.
        out: the step's output folder, for progress.
    """

    def __init__(
        self, config: EvaluateConfig, weights: Weights, data: dict[str, Any], *, world: World, out: str
    ) -> None:
        self.config, self.weights, self.world, self.device = config, weights, world, world.device
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.data_name: str = data["name"]
        self._manifest: str = data["manifest"]
        self._splits: dict[str, ShardDataset] = {}
        self._features: dict[bytes, Features] = {}
        self._progress: Progress | None = None
        self._done, self._total = 0, sum(self.planned().values())
        if world.rank == 0 and self._total:
            self._progress = Progress(out, total=self._total, unit="images")

    def planned(self) -> dict[bytes, int]:
        """Images of every pass that the evaluators need, each pass once."""
        passes = {}
        for evaluator in self.config.evaluators:
            if isinstance(evaluator, OnData):
                setting = self.setting(evaluator)
                splits = [self.config.split]
                kind = "logits"
                if isinstance(evaluator, Knn | Linear):
                    splits.append(evaluator.train_split)
                    kind = "features"
                for split in splits:
                    passes[_key(kind, setting, split)] = len(self.split(split))
        return passes

    def setting(self, evaluator: OnData) -> Setting:
        """The model and the view that an evaluator asks for."""
        return setting_of(evaluator, self.config, self.weights)

    def split(self, name: str) -> ShardDataset:
        """A split of the data set, opened once; raises DataInvalid when there is none of this name."""
        if name not in self._splits:
            self._splits[name] = ShardDataset.open(self._manifest, name, self.config.data.cache)
        return self._splits[name]

    def class_names(self) -> list[str] | None:
        """The classifier's classes in index order: as its own config or as the config's file names them."""
        if self.weights.class_names is None and (uri := self.config.classes):
            return read_class_names(uri, self.weights.num_classes, self.config.classes_sha256)
        return self.weights.class_names

    def class_facts(self) -> dict[str, str]:
        """What identifies the class names that the head's rows were taken for; the same weights may be given others."""
        names = self.class_names()
        return (
            {} if names is None else {"classes_sha256": storage.sha256_bytes(storage.canonical_json(names))}
        )

    def model(self, setting: Setting) -> nn.Module:
        """The model of a setting, on the device."""
        return self.weights.model(setting.backbone).to(self.device, self.dtype)

    def logits(self, setting: Setting) -> Iterator[tuple[Any, Tensor]]:
        """(batch, logits (B, K) fp32) of this rank's share of the evaluated split. No collective is called inside."""
        model = self.model(setting)
        return self._run(setting, self.config.split, lambda image: model(image).float())

    def features(self, setting: Setting, split: str) -> Features:
        """Frozen features of a split, made once for each setting. Collective."""
        key = _key("features", setting, split)
        if key not in self._features:
            model = self.model(setting)

            def tokens(image: Tensor) -> Tensor:
                return model.forward_features(image)["tokens"]  # type: ignore[operator]

            self._features[key] = collect(
                self._run(setting, split, tokens),
                samples=len(self.split(split)),
                width=setting.backbone.embed_dim,
                device=self.device,
            )
        return self._features[key]

    def finish(self, **metrics: float) -> None:
        """Say that all is done."""
        if self._progress:
            self._progress.update(self._total, state="done", force=True, **metrics)

    @torch.inference_mode()
    def _run(
        self, setting: Setting, split: str, forward: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[Any, Tensor]]:
        config, dataset = self.config, self.split(split)
        feed = EvalFeed(
            dataset,
            setting.view,
            rank=self.world.rank,
            world_size=self.world.world_size,
            batch_size=config.data.batch_size,
            loader_workers=config.data.loader_workers,
        )
        began = self._done
        with feed:
            for batch in on_device(feed, self.device):
                image = augment.to_float01(batch.images)
                image = augment.normalise(image, *setting.normalisation)
                yield batch, forward(image.to(self.dtype))
                self._done += len(batch.labels) * self.world.world_size
                if self._progress:
                    self._progress.update(min(self._done, self._total))
        self._done = began + len(dataset)


def passes_of_logits(bench: Workbench) -> list[tuple[Setting, list[Classification | Real]]]:
    """The evaluators that look at predictions, those of one setting together, in the config's order."""
    groups: dict[bytes, tuple[Setting, list[Classification | Real]]] = {}
    for evaluator in bench.config.evaluators:
        if isinstance(evaluator, Classification | Real):
            setting = bench.setting(evaluator)
            groups.setdefault(_key("logits", setting, ""), (setting, []))[1].append(evaluator)
    return list(groups.values())


def _key(kind: str, setting: Setting, split: str) -> bytes:
    return storage.canonical_json([kind, split, setting.facts])


def own_facts(evaluator: Evaluator) -> dict[str, Any]:
    """The fields of an evaluator that decide its values, less those that a setting resolves."""
    resolved = {"acceleration", "image_size", "crop_pct", "confused_pairs", "sha256"}
    return {name: value for name, value in evaluator.identity().items() if name not in resolved}
