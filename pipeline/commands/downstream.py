"""`itpn finetune` and `itpn evaluate`: a recipe for one checkpoint, wherever it comes from.

Torch and the recipes are imported by the commands, so that `itpn` starts without them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from cluster.errors import ConfigError
from pipeline import recipes
from pipeline.commands.common import JsonOpt, RootOpt, console_of, guarded, root_of
from pipeline.commands.run import (
    MAX_PARALLEL,
    AddressOpt,
    DryRunOpt,
    MaxParallelOpt,
    NoWaitOpt,
    OnlyOpt,
    SetOpt,
    run_recipe,
)
from stages.config import parse_assignments

if TYPE_CHECKING:
    from pipeline.given import Given

CheckpointArg = Annotated[
    str,
    typer.Argument(
        help="A weights file or its folder (URI), or in the root's registry: an alias, a step, a sha256."
    ),
]
DataOpt = Annotated[
    str,
    typer.Option(
        "--data", help="URI of the images, or a finished shard step; else what the checkpoint was trained on."
    ),
]
ClassesOpt = Annotated[
    str,
    typer.Option(
        "--classes",
        help="A published classifier's class names: a WordNet id on each line, in its head's order.",
    ),
]


@guarded
def finetune(
    checkpoint: CheckpointArg,
    root: RootOpt = "",
    data: DataOpt = "",
    recipe: Annotated[
        str, typer.Option(help="Recipe of the values; by default that of the model's size.")
    ] = "",
    ema: Annotated[bool, typer.Option("--ema", help="A published file's averaged weights.")] = False,
    classes: ClassesOpt = "",
    set_: SetOpt = [],  # noqa: B006  (typer copies it)
    only: OnlyOpt = [],  # noqa: B006
    dry_run: DryRunOpt = False,
    no_wait: NoWaitOpt = False,
    max_parallel: MaxParallelOpt = MAX_PARALLEL,
    address: AddressOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Fine-tune from a checkpoint at the published resolutions, or any grid of values, and evaluate each job.

    [bold]Examples[/]

      itpn finetune /weights/fast_itpn_base.pth --root s3://bucket/itpn --data s3://bucket/ILSVRC2012.tar

      itpn finetune pretrain/demo/v1 --root runs/demo --set 'grid.resolution=[96,128]' --set 'grid.lr=[1e-3,2e-3]'
    """
    from pipeline.given import SHAPE, Given, about
    from pipeline.recipes._downstream import DownstreamRecipe

    given = Given(root_of(root), checkpoint, ema, classes)
    name = recipe or (
        f"downstream_{given.size.removeprefix('fast_itpn_')}" if given.size else "downstream_base"
    )
    if not recipe and name not in recipes.names():  # a size that has no recipe of its own
        name = "downstream_base"
    module = recipes.load(name)
    config = module.Recipe()
    if not isinstance(config, DownstreamRecipe):
        raise ConfigError(
            f"recipe '{name}' does not start from a checkpoint",
            expected=", ".join(n for n in recipes.names() if n.startswith("downstream")),
        )
    shape = {field: getattr(given.backbone, field) for field in SHAPE}
    backbone = config.finetune.backbone.model_copy(update=shape)
    config = config.model_copy(update={"finetune": config.finetune.model_copy(update={"backbone": backbone})})
    config = about(config, root_of(root), given, data).with_set(parse_assignments(set_))
    _tell(given, name, as_json)
    run_recipe(
        name,
        module,
        config,
        root,
        only=only,
        dry_run=dry_run,
        no_wait=no_wait,
        max_parallel=max_parallel,
        address=address,
        as_json=as_json,
    )


@guarded
def evaluate(
    checkpoint: CheckpointArg,
    root: RootOpt = "",
    data: DataOpt = "",
    ema: Annotated[bool, typer.Option("--ema", help="A published file's averaged weights.")] = False,
    classes: ClassesOpt = "",
    set_: SetOpt = [],  # noqa: B006
    dry_run: DryRunOpt = False,
    no_wait: NoWaitOpt = False,
    address: AddressOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Measure a checkpoint at its own resolution: accuracy of a classifier, k-NN and linear probe, speed.

    [bold]Examples[/]

      itpn evaluate pretrain/demo/v1 --root runs/demo --set gpus_per_worker=0

      itpn evaluate /weights/fast_itpn_base_224.pth --root s3://bucket/itpn --data s3://bucket/ILSVRC2012.tar \
        --classes LOC_synset_mapping.txt \
        --set also.imagenet_real=/data/real.json --set also.imagenet_a=/data/imagenet-a.tar
    """
    from pipeline.given import Given, about
    from pipeline.recipes._imagenet import WHOLE_IMAGE_FROM

    given = Given(root_of(root), checkpoint, ema, classes)
    module = recipes.load("evaluate")
    config = module.Recipe()
    size = given.backbone.img_size
    view = {"size": size, "crop_pct": 1.0 if size >= WHOLE_IMAGE_FROM else config.evaluate.data.view.crop_pct}
    values = config.evaluate.model_dump()
    values["data"]["view"] |= view
    config = config.model_copy(update={"evaluate": type(config.evaluate).parse(values)})
    changes = parse_assignments(set_)
    config = about(config, root_of(root), given, data).with_set(changes)
    if not {"evaluate", "evaluate.evaluators"} & changes.keys():
        every = module.measurements(classifier=given.kind == "classifier", splits=config.data.splits)
        update = {"evaluate": config.evaluate.model_copy(update={"evaluators": every})}
        config = config.model_copy(update=update)
    _tell(given, "evaluate", as_json)
    run_recipe(
        "evaluate",
        module,
        config,
        root,
        only=[],
        dry_run=dry_run,
        no_wait=no_wait,
        max_parallel=MAX_PARALLEL,
        address=address,
        as_json=as_json,
    )


def _tell(given: Given, recipe: str, as_json: bool) -> None:
    what = (
        given.size
        or f"{given.backbone.family}, {given.backbone.embed_dim} wide, depths {given.backbone.depths}"
    )
    facts = f"sha256 {(given.config.sha256 or '')[:12]}  {given.kind}, {what}: recipe {recipe}"
    console_of(as_json).print(Text(f"checkpoint {given.config.uri}  {facts}"), soft_wrap=True)
