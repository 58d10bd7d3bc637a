"""The model and the view that an evaluator asks for, resolved against the checkpoint and the evaluation's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cluster import storage
from cluster.errors import ConfigError
from stages.data.view import EvalView
from stages.evaluate.config import Acceleration, EvaluateConfig, OnData
from stages.model import BackboneConfig, Normalisation, accelerated
from stages.model.files import local_copy
from stages.model.infer import infer_config
from stages.model.io import build, load_into, read_described, zero_untrained
from stages.model.mfm import published_name

IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TRAINED_BY = {"drop_path", "stop_grad_stem"}  # fields of a backbone that decide nothing once it is trained
HALF = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Weights:
    """A checkpoint's tensors and what its `config.json` says (of a published file: what its shapes say)."""

    state: Mapping[str, Tensor]
    description: dict[str, Any]

    @classmethod
    def open(cls, uri: str, sha256: str) -> Weights:
        """Read them; raises DataInvalid when the file is missing, broken or another one."""
        with local_copy(uri, sha256=sha256) as path:
            state, config = read_described(uri, path)
        return cls(state, config or infer_config(state))

    @property
    def backbone(self) -> BackboneConfig:
        return BackboneConfig.parse(self.description["backbone"])

    @property
    def num_classes(self) -> int:
        """Rows of the head; 0 without one."""
        return self.description.get("num_classes", 0)

    @property
    def fingerprint(self) -> str:
        """sha256 of the graph that the weights are run in: a corrected `config.json` gives other figures.

        Names of classes and the normalisation are not in it: the facts of the evaluators that they decide have them.
        """
        fields = {name: value for name, value in self.backbone.identity().items() if name not in TRAINED_BY}
        graph = {"backbone": fields, "num_classes": self.num_classes}
        return storage.sha256_bytes(storage.canonical_json(graph))

    @property
    def class_names(self) -> list[str] | None:
        return self.description.get("classes")

    @property
    def normalisation(self) -> Normalisation:
        """Of the inputs that the weights were trained on."""
        if found := self.description.get("normalisation"):
            return Normalisation(tuple(found["mean"]), tuple(found["std"]))
        return IMAGENET if self.num_classes else HALF

    def model(self, backbone: BackboneConfig) -> nn.Module:
        """The classifier, or the backbone of a checkpoint of pre-training, in evaluation mode.

        Position embeddings are resized to the backbone's `img_size`. Gathering tokens that were never trained are
        zero: each then begins as the mean of its share of the tokens.
        """
        kind = (
            {"kind": "classifier", "num_classes": self.num_classes}
            if self.num_classes
            else {"kind": "backbone"}
        )
        model = build({**kind, "backbone": backbone.identity()})
        state = {
            name: value
            for name, value in self.state.items()
            if backbone.gathering or published_name(name) != "gather_embed"
        }
        report = load_into(model, state, allow_missing=("gather_embed",))
        zero_untrained(model, report)
        return model.eval()


@dataclass(frozen=True)
class Setting:
    """A model and a view.

    Args:
        normalisation: of the inputs.
        variant: how they differ from the plain ones; empty when they do not.
        facts: what identifies them, JSON-ready.
    """

    backbone: BackboneConfig
    view: EvalView
    normalisation: Normalisation
    variant: str
    facts: dict[str, Any]


def setting_of(evaluator: OnData, config: EvaluateConfig, weights: Weights) -> Setting:
    """Raises ConfigError for a size or an acceleration that the model cannot take."""
    plain, own, trained = config.data.view, weights.backbone, weights.normalisation
    inputs = Normalisation(config.mean or trained.mean, config.std or trained.std)
    changes = {"size": evaluator.image_size, "crop_pct": evaluator.crop_pct}
    view = plain.model_copy(update={name: value for name, value in changes.items() if value is not None})
    backbone = configure(own, evaluator.acceleration, view.size)
    parts = []
    if acceleration_of(backbone) != acceleration_of(own):
        parts.append(name_of(backbone))
    parts += [f"{view.size}px"] if view.size != plain.size else []
    parts += [f"crop {view.crop_pct:g}"] if view.crop_pct != plain.crop_pct else []
    facts = {
        "split": config.split,
        "view": view.identity(),
        "mean": list(inputs.mean),
        "std": list(inputs.std),
        "precision": config.precision,
        "acceleration": acceleration_of(backbone),
    }
    return Setting(backbone, view, inputs, " ".join(parts), facts)


def configure(own: BackboneConfig, acceleration: Acceleration, image_size: int) -> BackboneConfig:
    """The checkpoint's backbone for another input, with the acceleration asked for.

    Raises ConfigError when the main stage is too short for migration, or a window is larger than the grid.
    """
    config = BackboneConfig.parse({**own.model_dump(), "img_size": image_size, "gathering": None})
    if acceleration.setting == "own":
        return BackboneConfig.parse({**own.model_dump(), "img_size": image_size})
    if acceleration.setting == "off":
        return config.model_copy(update={"migration": None})
    both = accelerated(config, image_size)
    migration, gathering = both.migration, both.gathering
    if migration is not None and acceleration.keep is not None:
        migration = migration.model_copy(update={"keep": acceleration.keep})
    if gathering is not None and own.gathering is not None:  # as many tokens as were trained
        gathering = gathering.model_copy(update={"tokens": own.gathering.tokens})
    chosen = {
        "migration": migration if acceleration.setting != "gathering" else None,
        "gathering": gathering if acceleration.setting != "migration" else None,
    }
    return config.model_copy(update=chosen)


def name_of(backbone: BackboneConfig) -> str:
    """`off`, `migration`, `gathering` or `both`, with the share kept where it is not one half."""
    migration, gathering = backbone.migration, backbone.gathering
    name = (
        "both"
        if migration and gathering
        else "migration"
        if migration
        else "gathering"
        if gathering
        else "off"
    )
    return name + (f" {migration.keep:g}" if migration and migration.keep != 0.5 else "")


def acceleration_of(backbone: BackboneConfig) -> dict[str, Any]:
    """What identifies the acceleration of a model, JSON-ready."""
    chosen = {"migration": backbone.migration, "gathering": backbone.gathering}
    return {name: value and value.identity() for name, value in chosen.items()}


def refuse_without_head(kind: str, num_classes: int) -> None:
    """Raise ConfigError when an evaluator needs a classifier and the checkpoint has no head."""
    if not num_classes:
        raise ConfigError(
            f"evaluator '{kind}' needs a classifier as the input 'checkpoint'",
            expected="weights with a head, of fine-tuning",
            found="weights without one, of pre-training",
            remedy="fine-tune it first, or ask for evaluators that need no head: --set evaluate.evaluators="
            """'[{"kind": "knn"}, {"kind": "linear"}]' (`--set evaluators=…` of python -m stages.evaluate)""",
        )
