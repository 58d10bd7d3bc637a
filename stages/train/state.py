"""The state of a run as files: what each rank writes, and how any world size reads it back.

A rank writes `rank-00000.safetensors`: one 1-D tensor per fragment, named `kind|parameter|offset`, and its
random state. Rank 0 also writes `common.safetensors`: buffers, and parameters that are not trained.
Reading fills this rank's fragments from whatever pieces overlap them, and demands that they cover everything:
another number of ranks or another ZeRO stage cuts the same numbers elsewhere, and gets them bit for bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.errors import DataInvalid
from stages.train.engine import Engine
from stages.train.fragments import Fragment

COMMON = "common.safetensors"


def rank_file(rank: int) -> str:
    """Name of the file that `rank` writes."""
    return f"rank-{rank:05d}.safetensors"


def snapshot(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """CPU copies of this rank's state, by file name. Training may go on at once."""
    mine: dict[str, Tensor] = {}
    for fragment in engine.fragments:
        if fragment.saved_here:
            for kind, view in fragment.tensors.items():
                mine[f"{kind}|{fragment.name}|{fragment.offset}"] = view.detach().to("cpu", copy=True)
    mine |= _random_state(engine.world.device)
    files = {rank_file(engine.world.rank): mine}
    if engine.world.rank == 0:
        buffers = {f"buffer|{n}": t.detach().to("cpu", copy=True) for n, t in _buffers(engine)}
        files[COMMON] = buffers | {f"frozen|{n}": t for n, t in engine.frozen.items()}
    return files


def write_files(files: dict[str, dict[str, Tensor]], folder: Path) -> list[Path]:
    """Write a snapshot below the local `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, tensors in files.items():
        path = folder / name
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        paths.append(path)
    return paths


def fill(engine: Engine, files: Sequence[str], open_file: Callable[[str], Path]) -> None:
    """Fill this rank's fragments and buffers from a checkpoint. Calls no collective, so that a rank may fail alone.

    Args:
        engine: its fragments and buffers are overwritten; `activate` must follow.
        files: names of all files of the checkpoint.
        open_file: gives the verified local copy of one of them; called only for those that are needed.

    Raises DataInvalid when the files do not hold every number of the model.
    """
    own = rank_file(engine.world.rank)
    saved_ranks = sorted(name for name in files if name.startswith("rank-"))
    for fragment in engine.fragments:
        fragment.filled.clear()
    todo = {id(f): f for f in engine.fragments}
    # The own file first: with an unchanged layout it is all that is needed.
    for name in [*([own] if own in files else []), *(n for n in saved_ranks if n != own)]:
        if not todo:
            break
        _fill(list(todo.values()), open_file(name), done=lambda f: todo.pop(id(f)))
    if todo:
        missing = next(iter(todo.values()))
        raise DataInvalid(
            f"the checkpoint does not hold all of parameter '{missing.name}'",
            expected=f"elements {missing.offset} to {missing.offset + missing.numel}",
            found=f"files {', '.join(saved_ranks)}",
            remedy="it was made from another model config: use that one, or another output folder",
        )
    common = load_file(open_file(COMMON))
    for name, buffer in _buffers(engine):
        if f"buffer|{name}" in common:
            buffer.copy_(common[f"buffer|{name}"])


def activate(
    engine: Engine, files: Sequence[str], open_file: Callable[[str], Path], scalars: dict[str, Any]
) -> bool:
    """*Collective.* Make what `fill` read the state that training goes on from.

    `scalars` is what `Engine.scalars` gave when the checkpoint was made. Returns whether this rank's random
    state was restored too, which needs the world size it was saved with.
    """
    engine.after_load(scalars)
    ranks = sum(name.startswith("rank-") for name in files)
    if ranks != engine.world.world_size:
        return False
    _set_random_state(open_file(rank_file(engine.world.rank)), engine.world.device)
    return True


def consolidate(
    files: Sequence[str],
    open_file: Callable[[str], Path],
    shapes: dict[str, torch.Size],
    *,
    kind: str = "master",
) -> dict[str, Tensor]:
    """Whole fp32 parameters (`kind` master or ema), buffers and frozen parameters, from the files of a checkpoint.

    `shapes` gives the shape of every trainable parameter. Raises DataInvalid when an element is missing.
    """
    state = {name: torch.empty(shape.numel()) for name, shape in shapes.items()}
    filled = dict.fromkeys(shapes, 0)
    for file in sorted(name for name in files if name.startswith("rank-")):
        with safe_open(open_file(file), "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                part, name, offset = _split(key)
                if part == kind and name in state:
                    piece = tensors.get_tensor(key)
                    state[name][offset : offset + piece.numel()] = piece
                    filled[name] += piece.numel()
    for name, shape in shapes.items():
        if filled[name] != shape.numel():
            raise DataInvalid(
                f"the checkpoint holds {filled[name]} of the {shape.numel()} elements of '{name}'",
                remedy="it is damaged: remove its manifest to fall back to the one before",
            )
    whole = {name: flat.view(shapes[name]) for name, flat in state.items()}
    whole |= {key.split("|", 1)[1]: tensor for key, tensor in load_file(open_file(COMMON)).items()}
    return whole


def _fill(fragments: list[Fragment], path: Path, done: Callable[[Fragment], object]) -> None:
    with safe_open(path, "pt") as tensors:
        pieces: dict[tuple[str, str], list[tuple[int, str]]] = {}
        for key in tensors.keys():  # noqa: SIM118 (not a dict)
            kind, name, offset = _split(key)
            pieces.setdefault((kind, name), []).append((offset, key))
        for fragment in fragments:
            for kind, view in fragment.tensors.items():
                for offset, key in pieces.get((kind, fragment.name), []):
                    numel = tensors.get_slice(key).get_shape()[0]
                    start, end = (
                        max(offset, fragment.offset),
                        min(offset + numel, fragment.offset + fragment.numel),
                    )
                    if start < end:
                        piece = tensors.get_tensor(key)[start - offset : end - offset]
                        view[start - fragment.offset : end - fragment.offset].copy_(piece)
                        fragment.filled[kind] = fragment.filled.get(kind, 0) + end - start
            if all(fragment.filled.get(kind, 0) == fragment.numel for kind in fragment.tensors):
                fragment.filled.clear()
                done(fragment)


def _split(key: str) -> tuple[str, str, int]:
    kind, name, offset = key.split("|")
    return kind, name, int(offset) if offset else 0


def _buffers(engine: Engine) -> list[tuple[str, Tensor]]:
    parameters = {name for name, _ in engine.module.named_parameters()}
    return [(n, t) for n, t in engine.module.state_dict(keep_vars=True).items() if n not in parameters]


def _random_state(device: str) -> dict[str, Tensor]:
    """The generators that a step may use, as tensors: torch (CPU, this GPU), numpy's and Python's global ones."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert version == 3 and name == "MT19937"
    state = {
        "rng|torch|": torch.get_rng_state(),
        "rng|python|": torch.tensor(words, dtype=torch.int64),
        "rng|python_gauss|": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "rng|numpy|": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "rng|numpy_rest|": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
    }
    if device.startswith("cuda"):
        state["rng|cuda|"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(path: Path, device: str) -> None:
    with safe_open(path, "pt") as tensors:
        torch.set_rng_state(tensors.get_tensor("rng|torch|"))
        gauss = float(tensors.get_tensor("rng|python_gauss|"))
        words = tuple(tensors.get_tensor("rng|python|").tolist())
        random.setstate((3, words, None if gauss != gauss else gauss))
        position, has_gauss, cached = tensors.get_tensor("rng|numpy_rest|").tolist()
        keys = tensors.get_tensor("rng|numpy|").numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
        if device.startswith("cuda") and "rng|cuda|" in tensors.keys():  # noqa: SIM118
            torch.cuda.set_rng_state(tensors.get_tensor("rng|cuda|"), device)
