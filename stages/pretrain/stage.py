"""Pre-train a backbone by masked feature modelling against a frozen teacher, on any number of ranks.

Ends with consolidated weights (`model.safetensors`, `config.json`), the metrics, and a CheckpointRef.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster import distributed, storage
from cluster.distributed import World
from stages.artifacts import Artifact, Outcome
from stages.context import StageContext
from stages.pretrain.config import PretrainConfig
from stages.train.handover import trained, training_data
from stages.train.launch import as_rank, spec_of, world_sizes
from stages.train.layout import CHECKPOINTS


def run(config: PretrainConfig, inputs: Mapping[str, Artifact], context: StageContext) -> Outcome:
    """Train and return the checkpoint.

    Raises:
        ConfigError: an input is missing, or sizes do not fit (the teacher's grid, batch and ranks).
        TrainingDiverged: the guard gave up. Stopped: asked to stop; the state is saved.
    """
    data = training_data("pretrain", inputs, config.data, config.backbone)
    spec = spec_of(
        context,
        timeout_s=config.engine.timeout_s,
        marks=storage.join(context.out, CHECKPOINTS),
        world_sizes=world_sizes(context.resources, config, config.data.streams),
        config=config.model_dump(mode="json"),
        data=data.model_dump(),
    )
    result = context.executor.workers(pretrain_rank, spec, context.resources)
    return trained(
        result, context, data, config.seed, task="pretrain", teacher_sha256=result["teacher_sha256"]
    )


def pretrain_rank(spec: dict[str, Any]) -> dict[str, Any]:
    """The work of one rank; `spec` is what `run` made."""
    config = PretrainConfig.parse(spec["config"])
    return as_rank(spec, lambda world: _train(config, spec, world))


def _train(config: PretrainConfig, spec: dict[str, Any], world: World) -> dict[str, Any]:
    import torch

    from stages.data.order import Order
    from stages.model import (
        MaskedFeatureModel,
        Normalisation,
        check_grids,
        layer_id,
        load_teacher,
        num_layers,
    )
    from stages.model.flops import pretrain_flops, teacher_flops
    from stages.pretrain.task import MfmTask
    from stages.train.export import export_model
    from stages.train.feeds import open_training_data
    from stages.train.loop import Trainer

    dataset, order, make_feed = open_training_data(
        config, config.data, spec["data"]["manifest"], split="train", world=world
    )
    assert isinstance(order, Order)
    teacher = load_teacher(config.teacher, world.device)
    check_grids(config.backbone, teacher)
    torch.manual_seed(config.seed)  # equal initial weights on all ranks
    module = MaskedFeatureModel(config.backbone, config.objective, teacher.dim)
    module.normalisation = Normalisation(config.mean, config.std)
    depths = config.backbone.depths
    trainer = Trainer(
        task=MfmTask(config, module, teacher, world.device),
        config=config,
        world=world,
        make_feed=make_feed,
        steps_per_epoch=order.steps_per_epoch,
        out=spec["out"],
        attempt=spec["attempt"],
        identity={**config.identity(), "teacher_sha256": teacher.sha256, "data": dataset.fingerprint},
        data_fingerprint=dataset.fingerprint,
        code_version=spec["code_version"],
        layer_of=lambda name: layer_id(name, depths),
        layers=num_layers(depths),
        flops_per_image=3 * pretrain_flops(config.backbone, config.objective, teacher.dim)
        + teacher_flops(teacher),
    )
    result = trainer.train()

    def export() -> dict[str, Any]:
        return export_model(
            module, module.describe(), result, out=spec["out"], files=spec["files"], ema=config.ema_decay > 0
        )

    return distributed.on_rank_zero(export) | trainer.summary(result) | {"teacher_sha256": teacher.sha256}
