"""Rank, world size and the few collectives that stages use. Imports torch inside functions, so that it costs
nothing where one process is enough.

The same code runs under torchrun, under Ray Train (which has made the process group already) and in a single
process without any environment. Collectives carry a time limit: a dead or stuck peer becomes an error.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from cluster.errors import ConfigError, portable
from cluster.rendezvous import open_store

if TYPE_CHECKING:
    import torch

DEFAULT_TIMEOUT_S = 600.0
_stop = threading.Event()
_ours = False  # whether `init` made the process group (Ray Train makes and removes its own)
_own_port = False  # whether `init` chose MASTER_PORT


@dataclass(frozen=True)
class World:
    """This process among its peers. `device` is `cpu` or `cuda:<local rank>`."""

    rank: int
    world_size: int
    local_rank: int
    device: str


def init(*, timeout_s: float = DEFAULT_TIMEOUT_S, use_gpu: bool | None = None) -> World:
    """Join the process group named by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or be alone.

    Args:
        timeout_s: limit on every collective.
        use_gpu: one GPU per rank over NCCL; by default when CUDA is there, else gloo on the CPU.

    A group that exists already (Ray Train's) is reused. The limit holds for groups that libraries make later, too.

    Raises ConfigError when only a part of the environment is set, or when there are fewer GPUs than ranks on this
    machine.
    """
    import torch
    import torch.distributed as dist

    _die_with_launcher()
    rank, world_size = _integer("RANK", 0), _integer("WORLD_SIZE", 1)
    local_rank = _integer("LOCAL_RANK", rank if world_size == 1 else None)
    gpu = torch.cuda.is_available() if use_gpu is None else use_gpu
    device = "cpu"
    if gpu:
        # Ray shows each worker its own GPUs only; torchrun shows all of them to every rank.
        seen = torch.cuda.device_count()
        index = 0 if seen == 1 else local_rank
        if index >= seen:
            raise ConfigError(
                f"rank {rank} has no GPU",
                expected=f"more than {index} visible",
                found=f"{seen}",
                remedy="start as many ranks per machine as it has GPUs",
            )
        device = f"cuda:{index}"
        torch.cuda.set_device(index)
    global _ours, _own_port
    if not dist.is_initialized():
        _ours = True
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if world_size == 1 and "MASTER_PORT" not in os.environ:
            _own_port = True
            os.environ["MASTER_PORT"] = str(free_port())
        elif "MASTER_PORT" not in os.environ:
            raise ConfigError(
                "MASTER_PORT is not set, but WORLD_SIZE is",
                remedy="start the ranks with torchrun, or through Ray",
            )
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
            store=open_store(rank, world_size, timeout_s),
            device_id=torch.device(device) if gpu else None,
        )
    _limit_groups(timedelta(seconds=timeout_s))
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device)


def _limit_groups(limit: timedelta) -> None:
    """Make `limit` what groups without a limit of their own get.

    DeepSpeed moves gradients and weights through such groups, and torch would give them 10 minutes on NCCL and 30 on
    gloo whatever the first group has. torch has no public name for it.
    """
    from torch.distributed import distributed_c10d

    distributed_c10d.default_pg_timeout = limit
    distributed_c10d.default_pg_nccl_timeout = limit


def shutdown() -> None:
    """Leave the process group that `init` made, so that this process can join another."""
    import torch.distributed as dist

    global _ours, _own_port
    from torch.distributed import constants, distributed_c10d

    if _ours and dist.is_initialized():
        dist.destroy_process_group()
    distributed_c10d.default_pg_timeout = constants.default_pg_timeout
    distributed_c10d.default_pg_nccl_timeout = constants.default_pg_nccl_timeout
    if _own_port:  # free for anybody now: neither the next group nor a child process may take it for granted
        os.environ.pop("MASTER_PORT", None)
    _ours = _own_port = False


def leave(code: int) -> NoReturn:
    """End this process, a rank whose work is done, without taking the interpreter and torch apart.

    Their end unwinds now and then a thread inside C++ code, which aborts the process ("terminate called without an
    active exception") after all is written; torchrun would take the rank for lost. Handlers of `atexit` run.
    """
    shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def rank() -> int:
    """This process's rank; 0 without a group."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks, in place, and return it. Without a group this is the tensor as it is."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
    """Overwrite `tensor` with rank `source`'s, in place, and return it; shapes and dtypes are equal on all ranks."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(tensor, src=source)
    return tensor


def broadcast_object(obj: Any) -> Any:
    """Rank 0's `obj` (picklable, small) on every rank."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(obj: Any) -> list[Any]:
    """Every rank's `obj` (picklable, small), by rank, on every rank."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [obj]
    boxes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, obj)
    return boxes


def assert_same_on_all_ranks(name: str, value: Any) -> None:
    """Raise ConfigError on every rank when the ranks disagree on `value`, telling who has what."""
    values = gather_objects(value)
    if any(other != values[0] for other in values):
        seen: dict[str, list[int]] = {}
        for rank, other in enumerate(values):
            seen.setdefault(str(other), []).append(rank)
        raise ConfigError(
            f"the ranks disagree on {name}",
            expected="one value on all ranks",
            found="; ".join(f"ranks {_ranges(ranks)}: {text}" for text, ranks in seen.items()),
            remedy="deploy the same code, config and data to every machine",
        )


def on_rank_zero(fn: Callable[[], Any]) -> Any:
    """Run `fn` on rank 0 and give its result to all; an exception of it is raised on every rank."""
    import torch.distributed as dist

    result: tuple[bool, Any] = (True, None)
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = (True, fn())
        except Exception as error:
            result = (False, portable(error))
    ok, value = broadcast_object(result)
    if not ok:
        raise value
    return value


def free_port() -> int:
    """A TCP port on 127.0.0.1 that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def request_stop() -> None:
    """Ask the training loop of this process to save and end at the next step (preemption notices call this)."""
    _stop.set()


def stop_requested() -> bool:
    """Whether this process was asked to stop."""
    return _stop.is_set()


class StopOnSignal:
    """Context: SIGTERM requests a stop instead of killing the process. Only the main thread can do this;
    elsewhere (Ray Train runs its function in a thread) the context does nothing and `request_stop` remains."""

    def __enter__(self) -> StopOnSignal:
        _stop.clear()
        self._previous: Any = None
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._previous = signal.signal(signal.SIGTERM, lambda *_: request_stop())
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._previous)
        _stop.clear()


def _die_with_launcher() -> None:
    """Under torchrun, ask the kernel for SIGKILL when the launcher dies.

    Ranks are in sessions of their own, so that a killed torchrun would leave them training, and a second start
    would have two writers.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent or parent == 1:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)


def _integer(name: str, default: int | None) -> int:
    text = os.environ.get(name)
    if text is None:
        if default is None:
            raise ConfigError(
                f"{name} is not set, but WORLD_SIZE is",
                remedy="start the ranks with torchrun, or through Ray",
            )
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} is not a number", found=text) from None


def _ranges(ranks: list[int]) -> str:
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
