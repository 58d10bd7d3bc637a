"""Fine-tune a classifier from pre-trained weights or from scratch, with the loop of pre-training.

Ends with consolidated weights (averaged ones, when EMA is on), the metrics, and a CheckpointRef.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster import distributed, storage
from cluster.distributed import World
from cluster.errors import ConfigError
from stages.artifacts import Artifact, CheckpointRef, Outcome
from stages.context import StageContext
from stages.finetune.config import FinetuneConfig
from stages.train.handover import trained, training_data
from stages.train.launch import as_rank, spec_of, world_sizes
from stages.train.layout import CHECKPOINTS


def run(config: FinetuneConfig, inputs: Mapping[str, Artifact], context: StageContext) -> Outcome:
    """Train and return the checkpoint; without the input `init` the weights start from scratch.

    Raises:
        ConfigError: an input is missing or of another kind, or sizes do not fit.
        DataInvalid: the initial weights do not fit the backbone.
        TrainingDiverged: the guard gave up. Stopped: asked to stop; the state is saved.
    """
    data = training_data("finetune", inputs, config.data, config.backbone)
    init = inputs.get("init")
    if init is not None and not isinstance(init, CheckpointRef):
        raise ConfigError("the input 'init' is no checkpoint", expected="a checkpoint", found=init.kind)
    spec = spec_of(
        context,
        timeout_s=config.engine.timeout_s,
        marks=storage.join(context.out, CHECKPOINTS),
        world_sizes=world_sizes(context.resources, config, config.data.streams),
        config=config.model_dump(mode="json"),
        data=data.model_dump(),
        init=init.model_dump() if init else None,
    )
    result = context.executor.workers(finetune_rank, spec, context.resources)
    return trained(
        result,
        context,
        data,
        config.seed,
        task="classify",
        init="pretrained" if init else "scratch",
        pretrain=init.uri if init else None,
        teacher_sha256=init.teacher_sha256 if init else None,
    )


def finetune_rank(spec: dict[str, Any]) -> dict[str, Any]:
    """The work of one rank; `spec` is what `run` made."""
    config = FinetuneConfig.parse(spec["config"])
    return as_rank(spec, lambda world: _train(config, spec, world))


def _train(config: FinetuneConfig, spec: dict[str, Any], world: World) -> dict[str, Any]:
    import torch

    from stages.finetune.start import start_from
    from stages.finetune.task import ClassifyTask
    from stages.model import Classifier, Normalisation, layer_id, num_layers
    from stages.model.flops import backbone_flops
    from stages.train.export import export_model
    from stages.train.feeds import open_training_data
    from stages.train.loop import Trainer

    dataset, order, make_feed = open_training_data(
        config, config.data, spec["data"]["manifest"], split=config.split, world=world
    )
    torch.manual_seed(config.seed)  # equal initial weights on all ranks
    module = Classifier(config.backbone, dataset.num_classes, config.head_init_scale)
    module.classes = tuple(dataset.classes)
    module.normalisation = Normalisation(config.mean, config.std)
    notes = []
    if spec["init"]:
        notes = start_from(module, spec["init"]["uri"], spec["init"]["sha256"], dataset.classes)
    if config.train == "head":
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.startswith(("head.", "fc_norm.")))
    depths = config.backbone.depths
    start = spec["init"] and spec["init"]["sha256"]
    size = config.backbone.img_size
    flops = backbone_flops(config.backbone, size, size, dataset.num_classes)
    trainer = Trainer(
        task=ClassifyTask(config, module, dataset.num_classes, world.device),
        config=config,
        world=world,
        make_feed=make_feed,
        steps_per_epoch=order.steps_per_epoch,
        out=spec["out"],
        attempt=spec["attempt"],
        identity={**config.identity(), "init_sha256": start, "data": dataset.fingerprint},
        data_fingerprint=dataset.fingerprint,
        code_version=spec["code_version"],
        layer_of=lambda name: layer_id(name, depths),
        layers=num_layers(depths),
        # Forward and backward are three forward passes; a frozen backbone runs forward only.
        flops_per_image=(3 if config.train == "all" else 1) * flops.total,
    )
    result = trainer.train()
    result["notes"] = notes + result["notes"]

    def export() -> dict[str, Any]:
        return export_model(
            module, module.describe(), result, out=spec["out"], files=spec["files"], ema=config.ema_decay > 0
        )

    return distributed.on_rank_zero(export) | trainer.summary(result)
