"""`itpn checkpoints export`: a checkpoint as files for other programs, verified, with its lineage."""

from __future__ import annotations

import shutil
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cluster import storage
from cluster.errors import ConfigError
from pipeline import view
from pipeline.commands.common import JsonOpt, RootOpt, console_of, guarded, root_of
from pipeline.registry import CheckpointRow, Registry
from pipeline.registry.deletions import Deletions
from pipeline.registry.lineage import find, lineage, read_record

if TYPE_CHECKING:
    from stages.evaluate.config import Acceleration


class Setting(StrEnum):
    OWN = "own"
    OFF = "off"
    MIGRATION = "migration"
    GATHERING = "gathering"
    BOTH = "both"


class Format(StrEnum):
    ITPN = "itpn"
    PUBLISHED = "published"
    ONNX = "onnx"


@guarded
def checkpoints_export(
    checkpoint: Annotated[str, typer.Argument(help="An alias, a step, or the start of a sha256.")],
    out: Annotated[Path, typer.Option(help="Local folder; it must be new or empty.")],
    formats: Annotated[
        list[Format], typer.Option("--format", help="Layout of the weights; may be given several times.")
    ] = [Format.ITPN],  # noqa: B006  (typer copies it)
    img_size: Annotated[
        int | None, typer.Option(min=16, help="Side of ONNX's input image in pixels; by default the model's.")
    ] = None,
    acceleration: Annotated[
        Setting, typer.Option(help="Token migration and gathering, at their defaults for the input size.")
    ] = Setting.OWN,
    keep: Annotated[
        float | None, typer.Option(help="Share of tokens that migration keeps, in (0, 1].")
    ] = None,
    root: RootOpt = "",
    as_json: JsonOpt = False,
) -> None:
    """Write a checkpoint into a folder, with its lineage in lineage.json; all of it or nothing.

    itpn: the files as they are stored, verified (with another acceleration: the same weights, another config).
    published: a torch file with the names of the published code. onnx: classifier.onnx and features.onnx, compared
    with torch (needs the extra onnx).

    [bold]Examples[/]

      itpn checkpoints export production --out ./production --root runs/demo

      itpn checkpoints export production --out ./onnx --format onnx --format published --img-size 256 --root runs/demo

      itpn checkpoints export production --out ./fast --format onnx --acceleration both --keep 0.6 --root runs/demo
    """
    from stages.evaluate.config import Acceleration  # imports torch, which takes a second

    asked = Acceleration.parse({"setting": acceleration.value, "keep": keep})
    registry = Registry(root_of(root))
    row = find(registry, checkpoint)
    Deletions(registry).refuse_deleted(row.checkpoint.uri)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty", remedy="name a new folder")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".itpn-export-", dir=out.absolute().parent))
    try:
        files = _write(registry, row, folder, formats, img_size, asked)
        if out.exists():
            out.rmdir()
        folder.chmod(0o755)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    console = console_of(as_json)
    console.print(_table(files))
    console.print(f"{row.step} in {out}", markup=False, soft_wrap=True)
    if as_json:
        view.print_json({"ok": True, "step": row.step, "out": str(out), "files": files})


def _write(
    registry: Registry,
    row: CheckpointRow,
    folder: Path,
    formats: list[Format],
    img_size: int | None,
    acceleration: Acceleration,
) -> list[dict[str, Any]]:
    """Everything into `folder`; returns what was written."""
    files: list[dict[str, Any]] = []
    own = acceleration.setting == "own"
    if Format.ITPN in formats and own:
        for info in read_record(registry.root, row.step).files:
            name = "/".join(info.path.split("/")[2:])  # without attempts/<id>/
            uri = storage.join(registry.root, row.step, info.path)
            storage.download_file(uri, folder / name, sha256=info.sha256, bytes=info.bytes)
            files.append(_fact(folder, name, "itpn"))
    others: list[Any] = [
        name.value for name in Format if name in formats and not (own and name is Format.ITPN)
    ]
    if others:
        from stages.evaluate.setting import configure
        from stages.model import BackboneConfig
        from stages.model.export import export

        uri = row.checkpoint.uri
        with tempfile.TemporaryDirectory(prefix="itpn-weights-") as temporary:
            local = Path(temporary) / uri.rpartition("/")[2]
            storage.download_file(uri, local, sha256=row.checkpoint.sha256, bytes=row.checkpoint.bytes)
            config = storage.join(uri.rpartition("/")[0], "config.json")
            storage.download_file(config, local.parent / "config.json")
            changes: dict[str, Any] = {}
            if not own:
                backbone = BackboneConfig.parse(
                    storage.read_json(str(local.parent / "config.json"))["backbone"]
                )
                chosen = configure(backbone, acceleration, img_size or backbone.img_size)
                changes = {"migration": chosen.migration or "off", "gathering": chosen.gathering or "off"}
            for done in export(str(local), folder, formats=others, img_size=img_size, **changes):
                fact = _fact(folder, done.path.relative_to(folder).as_posix(), done.format)
                files.append(fact | {"outputs": list(done.outputs), "deviation": done.error})
    (folder / "lineage.json").write_bytes(storage.canonical_json(lineage(registry.root, row.step)))
    return [*files, _fact(folder, "lineage.json", "json")]


def _fact(folder: Path, name: str, format_: str) -> dict[str, Any]:
    path = folder / name
    return {
        "name": name,
        "format": format_,
        "bytes": path.stat().st_size,
        "sha256": storage.sha256_file(path),
    }


def _table(files: list[dict[str, Any]]) -> Table:
    table = Table()
    for heading in ("file", "format", "MB", "sha256", "outputs", "deviation from torch"):
        table.add_column(heading, justify="right" if heading == "MB" else "left", overflow="fold")
    for file in files:
        deviation = file.get("deviation")
        cells = (file["name"], file["format"], f"{file['bytes'] / 1e6:.2f}", file["sha256"][:12])
        rest = (", ".join(file.get("outputs", [])), "" if deviation is None else f"{deviation:.1e} at most")
        table.add_row(*(Text(text) for text in (*cells, *rest)))
    return table
