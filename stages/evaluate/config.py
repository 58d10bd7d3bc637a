"""Config of an evaluation: what is read, and the evaluators, a list of data."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.config import Config, not_identity
from stages.data.config import EvalDataConfig


class Acceleration(Config):
    """Token migration and gathering of the model that is measured; a bare `setting` is enough.

    `own` leaves them as the checkpoint was trained; the others take the documented defaults
    (`stages.model.accelerated`), `migration` and `both` with another `keep` where it is given. Gathering tokens
    that a checkpoint was not trained with start as the mean of their share of the tokens.
    """

    setting: Literal["own", "off", "migration", "gathering", "both"] = "own"
    keep: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"setting": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _keep_is_of_migration(self) -> Self:
        if self.keep is not None and self.setting not in ("migration", "both"):
            raise ValueError(f"keep is the share that migration keeps; the setting is '{self.setting}'")
        return self


class OnData(Config):
    """What evaluators that look at images have in common: the model and the view, where they are not the plain ones.

    Another `image_size` (pixels) resizes the position embeddings, as fine-tuning does.
    """

    acceleration: Acceleration = Acceleration()
    image_size: int | None = Field(default=None, ge=16)
    crop_pct: float | None = Field(default=None, gt=0, le=1)


class Classification(OnData):
    """`top1`, `top5`, `loss`, `ece`, `mean_class_top1`, `worst_class_top1`, and a file with every class.

    Classes are matched as stages/evaluate/label_space.py says. With `restrict` the prediction is made among the
    classes that the data set has: the protocol of ImageNet-A and -R, which have 200 of 1000.
    """

    kind: Literal["classification"] = "classification"
    restrict: bool = True
    ece_bins: int = Field(default=15, ge=1)
    confused_pairs: int = Field(default=20, ge=0)  # of the file: the most frequent confusions


class Real(OnData):
    """`top1` by the reassessed labels of ImageNet's validation images (ImageNet-ReaL); `labels` is `real.json`."""

    kind: Literal["real"] = "real"
    labels: str = not_identity()
    sha256: str | None = None  # of the labels' file; recipes fill it in


class Knn(OnData):
    """`knn_top1`: a weighted k-nearest-neighbour vote on frozen features (DINO, arXiv:2104.14294)."""

    kind: Literal["knn"] = "knn"
    train_split: str = "train"
    k: int = Field(default=20, ge=1)
    temperature: float = Field(default=0.07, gt=0)


class Linear(OnData):
    """`linear_top1`: multinomial logistic regression on frozen features, standardised by the train split.

    Minimises the mean cross-entropy plus `l2`/2 times the squared weights (not the biases). It has one minimum,
    so it is deterministic. scikit-learn's C is 1 / (l2 · samples).
    """

    kind: Literal["linear"] = "linear"
    train_split: str = "train"
    l2: float = Field(default=1e-3, gt=0)
    max_iterations: int = Field(default=500, ge=1)


class Speed(Config):
    """`images_per_s`, `latency_p50_ms`, `latency_p99_ms`, `peak_memory_bytes`, `flops` of every combination.

    A latency is that of one forward pass of a batch. With a `classification` at the same settings it gives the
    accuracy-speed curve. No image size means that of the evaluation's view.
    """

    kind: Literal["speed"] = "speed"
    settings: tuple[Acceleration, ...] = Field(default=(Acceleration(),), min_length=1)
    image_sizes: tuple[int, ...] = ()
    batch_sizes: tuple[int, ...] = Field(default=(1, 64), min_length=1)
    warmup: int = Field(default=5, ge=1)  # passes before the clock starts
    iterations: int = Field(default=50, ge=1)


Evaluator = Annotated[Classification | Real | Knn | Linear | Speed, Field(discriminator="kind")]


class EvaluateConfig(Config):
    """Evaluators of one checkpoint on one split of a data set.

    Without `mean` and `std` inputs are normalised as the checkpoint says it was trained, and where it is silent, as
    published: ImageNet's for classifiers, 0.5 for pre-trained backbones.
    `classes` names the classifier's classes in index order, where its own config does not and the data set has
    others: a text file with a class (WordNet id) first on each line, or a data set's manifest.
    """

    split: str = "val"
    data: EvalDataConfig = EvalDataConfig()
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="of the model and its inputs")
    evaluators: tuple[Evaluator, ...] = Field(default=(Classification(),), min_length=1)
    classes: str | None = not_identity(None)
    classes_sha256: str | None = None  # of that file; recipes fill it in
    timeout_s: float = not_identity(600.0, gt=0)
