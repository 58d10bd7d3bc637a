"""Configs of the training loop, shared by pre-training and fine-tuning.

What changes the resulting weights is identity. ZeRO stage, micro-batch, saving and logging change speed and
memory only (sums are taken in another order, within float rounding), so a run may go on with others.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stages.config import Config, not_identity


class OptimiserConfig(Config):
    """AdamW. 1-D parameters, biases and position embeddings take no weight decay."""

    lr: float = Field(default=1.5e-3, gt=0)  # at the peak of the schedule; never scaled by the batch size
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(default=1e-6, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    layer_decay: float = Field(
        default=1.0, gt=0, le=1
    )  # lr of layer i is scaled by layer_decay ** (layers + 1 - i)


class ScheduleConfig(Config):
    """Cosine with linear warm-up, per step. Exactly one of `epochs` and `steps` is given."""

    epochs: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, gt=0)
    warmup_epochs: float = Field(default=0.0, ge=0)
    warmup_steps: int | None = Field(default=None, ge=0)  # wins over warmup_epochs
    min_lr: float = Field(default=1e-5, ge=0)
    warmup_lr: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _one_length(self) -> ScheduleConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of 'epochs' and 'steps'")
        return self


class EngineConfig(Config):
    """How a step is computed.

    `micro_batch` is the most samples that a rank computes at once: its part of the global batch is cut into the fewest
    equal pieces of at most so many, whose gradients add up in fp32. None takes it whole.
    """

    zero_stage: Literal[0, 1, 2, 3] = not_identity(1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    micro_batch: int | None = not_identity(None, gt=0)
    clip_grad: float = Field(default=3.0, ge=0)  # global L2 norm; 0 turns clipping off
    compile: bool = not_identity(False)
    zero3_persist_numel: int = not_identity(
        100_000, ge=0
    )  # ZeRO-3 keeps parameters below this whole on every rank
    bucket_mb: float = not_identity(100.0, gt=0)  # size of one gradient reduction
    timeout_s: float = not_identity(600.0, gt=0)  # limit on every collective
    # Dense peak of one device, for MFU; None takes that of well-known ones (stages/train/mfu.py).
    peak_tflops: float | None = not_identity(None, gt=0)


class CheckpointConfig(Config):
    """When to save, and what to keep. Nothing here is identity.

    At no instant is more work uncommitted than that of `save_every_steps` steps, or `save_every_minutes`, whichever is
    less; with neither, of an epoch. Saves are made at multiples of that many steps. Where they are written in the
    `background` one is made half-way between two of those as well, and the one before is committed when it begins, if
    need be by waiting (minutes likewise): what is lost is then never more than two halves. A save that is due inside a
    row of bad steps, which change nothing, waits for the end of the row.

    The last `keep_last` are kept, all at multiples of `keep_every_steps`, and the `keep_best` with the lowest running
    mean of the metric `best_by`.
    """

    save_every_steps: int | None = not_identity(None, gt=0)
    save_every_minutes: float | None = not_identity(None, gt=0)
    keep_last: int = not_identity(2, ge=1)
    keep_every_steps: int | None = not_identity(None, gt=0)
    keep_best: int = not_identity(0, ge=0)
    best_by: str = not_identity("loss")  # a name of the losses in the metrics
    background: bool = not_identity(True)  # else the loop stands still until each save is committed
    local_dir: str | None = not_identity(
        None
    )  # where files lie until uploaded; None: the system's temporary folder


class GuardConfig(Config):
    """What counts as a bad step, and what happens then.

    A bad step is not applied on any rank. `max_bad_steps` in a row roll back to the last checkpoint (the data
    of that window are skipped); after `max_rollbacks` of those the next one raises TrainingDiverged. In fp16 a gradient
    that overflows lowers the loss scale and is no fault, unless the scale is the lowest already or it is more than the
    `max_overflows`th in a row.
    """

    max_bad_steps: int = Field(default=5, ge=1)
    max_rollbacks: int = Field(default=3, ge=0)
    max_overflows: int = Field(default=20, ge=1)  # the scale begins at 2**16: 16 lead to the lowest
    spike_factor: float = Field(
        default=0.0, ge=0
    )  # bad if loss > factor x median of the last `spike_window`; 0: off
    spike_window: int = Field(default=50, ge=5)


class WatchConfig(Config):
    """What is written down while training runs. Nothing here is identity."""

    log_every_steps: int = not_identity(1, ge=1)
    picture_every_steps: int = not_identity(0, ge=0)  # 0: never
    tensorboard: bool = not_identity(False)  # event files go to <output>/tensorboard with every save


class LoopConfig(Config):
    """Everything of the loop but the model, the data and the objective."""

    seed: int = 0
    global_batch: int = Field(default=2048, gt=0)
    optimiser: OptimiserConfig = OptimiserConfig()
    schedule: ScheduleConfig
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    watch: WatchConfig = WatchConfig()
    ema_decay: float = Field(
        default=0.0, ge=0, lt=1
    )  # 0: off; else the averaged weights are what the stage hands on
