"""Writes a report: one folder of pages that open from disk, without a network."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cluster.errors import ConfigError, NotFound
from pipeline.report.read import Reader
from pipeline.report.site import Site

MARK = ".itpn-report.json"  # lists the report's files, and says that the folder may be written over


def build(root: str, out: Path) -> Path:
    """Write the report of `root` into the local folder `out`; returns the path of index.html.

    A report that is there already is replaced: pages that it had and this one has not are removed.

    Raises:
        ConfigError: `out` holds something that is not a report.
        NotFound: nothing was run under the root.
        PreflightError: plotly or jinja2 is not installed.
        StorageUnavailable, DataInvalid: the root cannot be read.
    """
    old = _old_files(out)
    snapshot = Reader(root).snapshot()
    if not snapshot.steps and not snapshot.results:
        raise NotFound(f"nothing was run under {snapshot.root}", remedy="name the root of a run with --root")
    site = Site(snapshot)
    paths = site.paths()
    out.mkdir(parents=True, exist_ok=True)
    # Before anything else: a report that was cut off may be written over too.
    _write(out / MARK, json.dumps(sorted(old | set(paths))).encode())
    written = set()
    for path in sorted(paths, key=lambda path: path.endswith(".html")):  # what pages need comes before them
        data = site.read(path)
        if data is not None:
            _write(out / path, data)
            written.add(path)
    for path in old - written:
        (out / path).unlink(missing_ok=True)
    _write(out / MARK, json.dumps(sorted(written)).encode())
    return out / "index.html"


def _old_files(out: Path) -> set[str]:
    """The files of the report that is in the folder; raises ConfigError when it holds anything else."""
    if not out.exists():
        return set()
    try:
        files = json.loads((out / MARK).read_text())
    except (OSError, ValueError):
        if out.is_dir() and not any(out.iterdir()):
            return set()
        raise ConfigError(
            f"{out} is no folder of a report",
            expected="a report, an empty folder, or none",
            remedy="--out NEW",
        ) from None
    return {path for path in files if not Path(path).is_absolute() and ".." not in Path(path).parts}


def _write(path: Path, data: bytes) -> None:
    """In one stroke: somebody may be looking at it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)
