"""Call a function on a sequence of arguments ahead of need, in order, in a thread or in processes."""

from __future__ import annotations

import atexit
import contextlib
import gc
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from cluster.errors import WorkerLost, portable

_PATIENCE_S = 5.0
_AHEAD = 2  # results that wait, per thread or process


@dataclass(frozen=True)
class Failure:
    """An error of the function, handed over as a value so that it arrives whole."""

    error: Exception


class Results:
    """An iterator over results that can be closed."""

    def __init__(self, results: Iterator[Any], close: Callable[[], None]) -> None:
        self._results, self._close = results, close
        self._closed = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._closed:
            raise StopIteration
        return next(self._results)

    def close(self) -> None:
        """Stop working ahead and let go of threads and processes."""
        if not self._closed:
            self._closed = True
            self._close()


def shareable(*shape: int) -> torch.Tensor:
    """An empty uint8 tensor, in shared memory when this is a loader process, so that handing it over copies nothing.

    (torch's own `default_collate` does the same.) It also keeps the queue's feeder thread out of long
    copies, in the middle of which the end of the process would abort it.
    """
    if get_worker_info() is None:
        # NumPy asks for huge pages: a batch then costs 2 µs an image to touch for the first time, not 15.
        return torch.from_numpy(np.empty(shape, np.uint8))
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.tensor([], dtype=torch.uint8).set_(storage).view(shape)


def prefetch(
    function: Callable[[Any], Any], arguments: Iterator[Any], *, workers: int, pin_memory: bool = False
) -> Results:
    """Results of `function` in the order of `arguments`; an exception becomes a `Failure` and ends them.

    With `workers=0` one thread runs two results ahead. With more, `function` is pickled to that many
    spawned processes, which run one torch thread each and hand tensors over in shared memory; one that
    dies (killed for memory, say) makes `next` raise WorkerLost.
    """
    if workers == 0:
        return _in_thread(function, arguments, pin_memory)
    return _in_processes(function, arguments, workers, pin_memory)


def _in_thread(function: Callable[[Any], Any], arguments: Iterator[Any], pin_memory: bool) -> Results:
    done: queue.Queue[Any] = queue.Queue(_AHEAD)
    stop = threading.Event()
    end = object()

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                done.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for argument in arguments:
                result = function(argument)
                if not put(result.pin_memory() if pin_memory else result):
                    return
            put(end)
        except Exception as error:
            put(Failure(error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()

    def results() -> Iterator[Any]:
        while (item := done.get()) is not end:
            yield item

    def close() -> None:
        stop.set()
        thread.join(_PATIENCE_S)  # a daemon: one that hangs in a dead store is left behind

    return Results(results(), close)


class _Calls(Dataset):
    """`function` as a map-style data set, so that the DataLoader's sampler carries the arguments."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __getitem__(self, argument: Any) -> Any:
        try:
            return self._function(argument)
        except Exception as error:
            return Failure(portable(error))


def _settle(worker: int) -> None:
    del worker
    torch.set_num_threads(1)
    gc.freeze()  # what torch's import left behind need not be searched again (3 % of the time otherwise)
    # The queue's thread may still hand a batch over when the feed is closed. Python's end would unwind it inside
    # torch's C++ code, which aborts the process; multiprocessing has flushed and cleaned up when this is reached.
    atexit.register(os._exit, 0)


def _exit_codes(iterator: Any) -> list[str]:
    """Of the DataLoader's processes that have failed: a negative one is the signal that killed it."""
    codes = [process.exitcode for process in getattr(iterator, "_workers", [])]
    return [f"exit code {code}" for code in codes if code]


def _in_processes(
    function: Callable[[Any], Any], arguments: Iterator[Any], workers: int, pin_memory: bool
) -> Results:
    loader = DataLoader(
        _Calls(function),
        sampler=arguments,  # any iterable serves; it is read lazily
        batch_size=None,
        num_workers=workers,
        prefetch_factor=_AHEAD,
        multiprocessing_context="spawn",  # object-store clients do not survive a fork
        worker_init_fn=_settle,
        pin_memory=pin_memory,
    )
    iterator = iter(loader)

    def results() -> Iterator[Any]:
        try:
            yield from iterator
        except (RuntimeError, OSError, EOFError) as error:
            # Errors of `function` come as values; what is raised here is the DataLoader's own watch over its
            # processes, or a broken socket where a dead one still had a tensor to hand over.
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise WorkerLost(
                "a data loader process died",
                found="; ".join([f"{type(error).__name__}: {error}", *_exit_codes(iterator)]),
                remedy="most often it was killed for memory: lower loader_workers, or give the job more; "
                "'bus error' means that /dev/shm is too small",
            ) from error

    def close() -> None:
        shutdown = getattr(iterator, "_shutdown_workers", None)
        if shutdown is not None:
            # A process that dies while it is being stopped (torch's SIGCHLD handler tells) is no error any more.
            with contextlib.suppress(RuntimeError):
                shutdown()

    return Results(results(), close)
