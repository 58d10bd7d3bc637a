"""Keep the last few files open that many short reads go to."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OPEN_FILES = 64  # at once; a process may often have 1,024, and several readers share them


@contextmanager
def kept_open(open_file: Callable[[int], int]) -> Iterator[Callable[[int], int]]:
    """A function number -> file descriptor that calls `open_file` for those not among the last 64 used."""
    opened: OrderedDict[int, int] = OrderedDict()

    def descriptor(number: int) -> int:
        if number not in opened:
            if len(opened) == OPEN_FILES:
                os.close(opened.popitem(last=False)[1])
            opened[number] = open_file(number)
        opened.move_to_end(number)
        return opened[number]

    try:
        yield descriptor
    finally:
        for one in opened.values():
            os.close(one)
