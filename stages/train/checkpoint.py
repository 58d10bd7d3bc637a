"""Checkpoints of a run: written in the background, committed by a manifest, verified when read.

Where they lie stands in stages/train/layout.py. Files without a manifest do not exist to anybody. Every rank
uploads its own files in a thread; the loop learns through its per-step reduction when all are there, and
rank 0 commits.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from cluster import distributed, scratch, storage
from cluster.distributed import World
from cluster.errors import AlreadyExists, DataInvalid, DriftError, ItpnError, StepFailed
from stages.artifacts import FileInfo
from stages.train import state
from stages.train.config import CheckpointConfig
from stages.train.layout import CHECKPOINTS, METRICS, checkpoint_steps, manifest_uri

log = logging.getLogger(__name__)
FORMAT = 1
Load = Callable[[dict[str, Any], Callable[[str], Path]], None]  # (manifest, open_file)


@dataclass
class Checkpoints:
    """The checkpoints of one run, as this rank sees them. Methods marked *collective* are called by all ranks.

    Args:
        out: URI of the step's output folder.
        attempt: unique id of this try.
        identity: the config's identity; a checkpoint of another one is not resumed.
    """

    out: str
    attempt: str
    world: World
    config: CheckpointConfig
    identity: dict[str, Any]
    stalled_s: float = 0.0  # time that the loop has waited for checkpoints
    segments: list[dict[str, Any]] = field(
        default_factory=list
    )  # metrics files that belong to the run so far
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"), repr=False)
    _upload: Future[list[FileInfo]] | None = None
    _commit: Future[None] | None = None
    _header: dict[str, Any] = field(default_factory=dict)
    _means: dict[int, dict[str, float]] = field(default_factory=dict)  # of committed checkpoints, by step

    def __post_init__(self) -> None:
        self._local = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=scratch.folder(self.config.local_dir)))

    # Writing

    def begin(
        self,
        step: int,
        files: dict[str, dict[str, Tensor]],
        header: dict[str, Any],
        extra: dict[str, Path],
    ) -> None:
        """Start to write a snapshot; at most one is under way, so a second one waits for the first.

        Args:
            files: what `state.snapshot` gave.
            header: goes into the manifest; `means` in it decide which checkpoints are best.
            extra: local files that are stored beside, by their paths below `out`, and removed (metrics).
        """
        assert self._upload is None, "finish() the checkpoint under way first"
        self._header = {"step": step, **header}
        self._upload = self._pool.submit(self._write, step, files, extra)

    @property
    def in_flight(self) -> bool:
        return self._upload is not None

    def uploaded(self) -> bool:
        """Whether this rank's files of the checkpoint under way are stored (or failed to be)."""
        return self._upload is not None and self._upload.done()

    def failed(self) -> bool:
        """Whether this rank could not write its files, or rank 0 its manifest."""
        pending = (self._upload, self._commit)
        return any(f is not None and f.done() and f.exception() is not None for f in pending)

    def finish(self) -> None:
        """*Collective.* Wait for this rank's upload, then commit. Raises on all ranks when one of them failed."""
        if self._upload is None:
            return
        began = time.monotonic()
        error = self._upload.exception()
        # As an error of ours: others might not survive the way to the other ranks.
        mine = _write_failed(self._header["step"], self.world.rank, error) if error else self._upload.result()
        parts = distributed.gather_objects(mine)
        self._upload = None
        for rank, part in enumerate(parts):
            if isinstance(part, BaseException):
                raise _write_failed(self._header["step"], rank, part)
        infos = [info for part in parts for info in part]
        self.segments = [*self.segments, *(i.model_dump() for i in infos if i.path.startswith(f"{METRICS}/"))]

        def commit() -> None:
            self._settle_commit()
            self._commit = self._pool.submit(self._store, self._manifest(infos))

        distributed.on_rank_zero(commit)
        self.stalled_s += time.monotonic() - began

    def drain(self) -> None:
        """*Collective.* Finish what is under way and wait until its manifest is stored."""
        self.finish()
        began = time.monotonic()
        distributed.on_rank_zero(self._settle_commit)
        self.stalled_s += time.monotonic() - began

    def close(self) -> None:
        """Stop the thread and remove local files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self._local, ignore_errors=True)

    def _write(
        self, step: int, files: dict[str, dict[str, Tensor]], extra: dict[str, Path]
    ) -> list[FileInfo]:
        folder = self._local / f"{step:09d}"
        infos = []
        try:
            for path in state.write_files(files, folder):
                relative = f"{CHECKPOINTS}/files/{step:09d}-{self.attempt}/{path.name}"
                infos.append(self._put(path, relative))
            for relative, path in extra.items():
                infos.append(self._put(path, relative))
                path.unlink(missing_ok=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return infos

    def _put(self, path: Path, relative: str) -> FileInfo:
        size, sha256 = storage.upload_file(path, storage.join(self.out, relative))
        return FileInfo(path=relative, bytes=size, sha256=sha256)

    def _manifest(self, infos: list[FileInfo]) -> dict[str, Any]:
        return {
            "format": FORMAT,
            **self._header,
            "world_size": self.world.world_size,
            "attempt": self.attempt,
            "identity": self.identity,
            "files": [info.model_dump() for info in infos if info.path.startswith(f"{CHECKPOINTS}/")],
            "metrics": self.segments,
            "created_at": time.time(),
        }

    def _store(self, manifest: dict[str, Any]) -> None:
        uri = manifest_uri(self.out, manifest["step"])
        try:
            storage.write_json_exclusive(uri, manifest)
        except AlreadyExists:
            # The last act of an attempt before this one, which had died for us only: its checkpoint is whole.
            if storage.read_json(uri)["identity"] != self.identity:
                raise
            log.warning("step %d was committed by an attempt before this one", manifest["step"])
        try:
            self._forget_old(manifest)
        except ItpnError as error:  # too many checkpoints are no reason to stop
            log.warning("old checkpoints were not deleted: %s", error.message)

    def _forget_old(self, newest: dict[str, Any]) -> None:
        """Delete what retention does not keep; the manifest goes first, so that no half is ever listed."""
        self._means[newest["step"]] = newest["means"]
        steps = [step for step in self.steps() if step <= newest["step"]]
        keep = self._kept(steps)
        for step in steps:
            if step not in keep:
                manifest = self.read(step)
                storage.delete(manifest_uri(self.out, step))
                for info in manifest["files"]:
                    storage.delete(storage.join(self.out, info["path"]))

    def _kept(self, steps: list[int]) -> set[int]:
        """Those of the committed steps that retention keeps; the last, which a resumed run needs, always."""
        every, best = self.config.keep_every_steps, self.config.keep_best
        keep = set(steps[-self.config.keep_last :]) | {s for s in steps if every and s % every == 0}
        if best:
            for step in steps:
                if step not in self._means:  # committed by an attempt before this one
                    self._means[step] = self.read(step)["means"]
            by = self.config.best_by
            ranked = sorted((self._means[step].get(by, math.inf), step) for step in steps)
            keep |= {step for _, step in ranked[:best]}
        return keep

    def _settle_commit(self) -> None:
        if self._commit is not None:
            commit, self._commit = self._commit, None
            error = commit.exception()
            if error is not None:
                raise _write_failed(self._header["step"], 0, error)

    # Reading

    def steps(self) -> list[int]:
        """Steps of all committed checkpoints, oldest first."""
        return checkpoint_steps(self.out)

    def restore_newest(self, fill: Load, activate: Load) -> dict[str, Any] | None:
        """*Collective.* Load the newest checkpoint that can be read in full, and return its manifest.

        `fill(manifest, open_file)` reads this rank's state and may raise DataInvalid on one rank alone; when it
        has on none, all ranks call `activate`. A checkpoint that is damaged is set aside (its manifest goes to
        `checkpoints/damaged/`) for the one before. None when there is none at all. Raises DriftError when the
        newest belongs to another config.
        """
        steps = distributed.on_rank_zero(self.steps)
        damage: list[str] = []
        for step in reversed(steps):
            manifest = distributed.on_rank_zero(partial(self.read, step))
            self._refuse_drift(manifest)
            local = scratch.folder(self.config.local_dir)
            with tempfile.TemporaryDirectory(prefix="restore-", dir=local) as folder:
                open_file = opener(self.out, manifest, Path(folder))
                error: DataInvalid | None = None
                try:
                    fill(manifest, open_file)
                except DataInvalid as found:
                    error = found
                bad = [text for text in distributed.gather_objects(str(error) if error else None) if text]
                if not bad:
                    activate(manifest, open_file)
                    return manifest
            damage += bad
            log.warning("checkpoint %d cannot be used, trying the one before: %s", step, bad[0])
            distributed.on_rank_zero(partial(self._set_aside, manifest, bad))
        if damage:
            raise DataInvalid(
                "no checkpoint of this run can be read",
                found=damage[0],
                remedy=f"look at {storage.join(self.out, CHECKPOINTS, 'damaged')}, or start a new version",
            )
        return None

    def _set_aside(self, manifest: dict[str, Any], damage: list[str]) -> None:
        name = f"{manifest['step']:09d}-{manifest['attempt']}.json"
        note = storage.canonical_json({**manifest, "damage": damage})
        storage.overwrite(storage.join(self.out, CHECKPOINTS, "damaged", name), note)
        storage.delete(manifest_uri(self.out, manifest["step"]))

    def read(self, step: int) -> dict[str, Any]:
        """The manifest of one committed step."""
        return storage.read_json(manifest_uri(self.out, step))

    def _refuse_drift(self, manifest: dict[str, Any]) -> None:
        if manifest["identity"] != self.identity:
            changed = _differences(manifest["identity"], self.identity)
            raise DriftError(
                f"{self.out} holds checkpoints of another config",
                expected="; ".join(f"{key} = {old!r}" for key, old, _ in changed),
                found="; ".join(f"{key} = {new!r}" for key, _, new in changed),
                remedy="undo the change, or give the step a new version",
            )


def is_due(step: int, every: int, background: bool) -> bool:
    """Whether a save begins after `step`: at multiples of `every`, and in the background half-way between them too.

    Each save is committed before the next begins, so that two halves of an interval are the most that can be lost.
    """
    return step % every in ((0, every // 2) if background else (0,))


def opener(out: str, manifest: dict[str, Any], folder: Path) -> Callable[[str], Path]:
    """A function that downloads a checkpoint's file by name into the local `folder`, verified, and gives its path."""
    infos = {info["path"].rsplit("/", 1)[1]: info for info in manifest["files"]}

    def open_file(name: str) -> Path:
        local = folder / name
        if not local.exists():
            info = infos.get(name)
            if info is None:
                raise DataInvalid(f"checkpoint {manifest['step']} lists no file '{name}'")
            uri = storage.join(out, info["path"])
            storage.download_file(uri, local, sha256=info["sha256"], bytes=info["bytes"])
        return local

    return open_file


def _write_failed(step: int, rank: int, error: BaseException) -> BaseException:
    if isinstance(error, ItpnError):
        return error
    return StepFailed(
        f"rank {rank} could not write the checkpoint of step {step}",
        found=f"{type(error).__name__}: {error}",
        remedy="free some disk space, or set checkpoint.local_dir; the last committed checkpoint is intact",
    )


def _differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [
            d for k in keys for d in _differences(old.get(k), new.get(k), f"{prefix}.{k}" if prefix else k)
        ]
    return [] if old == new else [(prefix, old, new)]
