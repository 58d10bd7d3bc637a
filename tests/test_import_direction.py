"""Imports point one way, pipeline -> stages -> cluster, and each fenced library has one importer."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for room in ("pipeline", "stages", "cluster") for p in (REPOSITORY / room).rglob("*.py"))
FORBIDDEN = {"cluster": {"stages", "pipeline"}, "stages": {"pipeline"}, "pipeline": set()}
FENCED = {
    "fsspec": {"cluster/storage/stores.py", "cluster/storage/uris.py"},
    "s3fs": {"cluster/storage/stores.py"},
    "ray": {"cluster/jobs/", "cluster/tune.py"},
    "deepspeed": {"stages/train/"},
}
NEVER = {"torchvision", "timm", "open_clip"}


def imported(path: Path) -> set[str]:
    """Top-level names of every import in the file, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_imports_respect_the_rooms(path: Path) -> None:
    where = path.relative_to(REPOSITORY).as_posix()
    names = imported(path)
    assert not names & FORBIDDEN[where.split("/")[0]]
    assert not names & NEVER
    for library, allowed in FENCED.items():
        if library in names:
            assert any(where.startswith(place) for place in allowed), f"{where} imports {library}"


def test_every_room_is_looked_at() -> None:
    assert len(SOURCES) > 20
