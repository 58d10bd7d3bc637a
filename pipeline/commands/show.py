"""`itpn show`: a picture of what a model sees in images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster import storage
from cluster.errors import ConfigError
from pipeline import view
from pipeline.commands.common import JsonOpt, RootOpt, console_of, guarded
from pipeline.registry import Registry
from pipeline.registry.lineage import find


@guarded
def show(
    model: Annotated[
        str,
        typer.Argument(
            help="Weights: a folder, model.safetensors or published checkpoint; with --root also an alias, "
            "a step or a sha256."
        ),
    ],
    images: Annotated[list[str], typer.Argument(help="Pictures, local or any URI.")],
    out: Annotated[Path, typer.Option("--out", help="The PNG to write.")] = Path("show.png"),
    teacher: Annotated[str | None, typer.Option(help="Teacher whose targets are shown as well.")] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of tokens that token migration keeps, in (0, 1].")
    ] = None,
    after_block: Annotated[
        int | None, typer.Option(help="Main-stage block after which they leave (default: a third).")
    ] = None,
    score: Annotated[str, typer.Option(help="What makes a token redundant: similarity, norm, random.")] = (
        "similarity"
    ),
    seed: Annotated[int, typer.Option(help="Chooses the masks.")] = 0,
    root: RootOpt = "",
    as_json: JsonOpt = False,
) -> None:
    """Draw the input, the mask, the feature maps of every level, the teacher's and which tokens migrate.

    A row per image: maps are coloured by their three principal components. Mask and prediction are there for
    pre-trained checkpoints, the teacher with --teacher, kept tokens where migration is on (or --keep is given).

    [bold]Examples[/]

      itpn show runs/demo/pretrain/demo/v1/attempts/…/model.safetensors cat.jpg dog.jpg --teacher assets/clip-micro

      itpn show production cat.jpg --root s3://bucket/itpn --keep 0.5 --out seen.png
    """
    from stages.model.config import MigrationConfig
    from stages.model.show import show as draw

    if keep is None and (after_block is not None or score != "similarity"):
        raise ConfigError("--after-block and --score say how tokens migrate", remedy="give --keep as well")
    migration = None
    if keep is not None:
        migration = MigrationConfig.parse({"keep": keep, "after_block": after_block, "score": score})
    uri = _weights(model, root)
    path = draw(uri, images, out, teacher=teacher, migration=migration, seed=seed)
    console_of(as_json).print(f"{len(images)} images → {path}", markup=False, soft_wrap=True)
    if as_json:
        view.print_json({"ok": True, "model": uri, "images": images, "png": str(path)})


def _weights(name: str, root: str) -> str:
    """The URI of what the user named: something that exists, else a checkpoint of the registry under `root`."""
    uri = storage.join(name)
    if storage.exists(uri) or storage.list_files(uri, most=1):
        return uri
    if root:
        return find(Registry(root), name).checkpoint.uri
    raise ConfigError(
        f"no model at '{name}'",
        expected="a folder with model.safetensors, a weights file, or a published checkpoint",
        found="nothing there",
        remedy="correct the path, or give --root to name a checkpoint of a registry",
    )
