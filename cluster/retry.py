"""Retry with jitter until a deadline."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 10.0


class DeadlineExceeded(Exception):
    """The last attempt failed too, and there is no time for another. `cause` is the most telling error."""

    def __init__(self, cause: Exception, attempts: int, elapsed_s: float) -> None:
        super().__init__(f"{attempts} attempts in {elapsed_s:.1f} s, the last one: {cause}")
        self.cause, self.attempts, self.elapsed_s = cause, attempts, elapsed_s


def retry(
    attempt: Callable[[float], T],
    *,
    transient: Callable[[Exception], bool],
    deadline_s: float,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """`attempt(seconds_left)` until it returns, or raises an error that is not transient.

    Delays grow exponentially and are drawn at random below their bound (full jitter), so that thousands of
    workers that were refused together do not come back together.

    Raises:
        DeadlineExceeded: when the next delay would end after `deadline_s`.
    """
    began = time.monotonic()
    cause: Exception | None = None
    number = 0
    while True:
        left_s = deadline_s - (time.monotonic() - began)
        try:
            return attempt(max(left_s, 0.001))
        except Exception as error:
            if not transient(error):
                raise
            # A bare timeout is usually our own limit cutting an attempt off: an earlier error says more.
            if cause is None or not isinstance(error, TimeoutError):
                cause = error
        delay_s = random.uniform(0.0, min(FIRST_DELAY_S * 2**number, LONGEST_DELAY_S))
        number += 1
        elapsed_s = time.monotonic() - began
        if elapsed_s + delay_s >= deadline_s:
            raise DeadlineExceeded(cause, number, elapsed_s) from cause
        sleep(delay_s)
