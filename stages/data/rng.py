"""Random numbers as pure functions of integers: no state, no seeding order, the same on every machine.

A draw is a hash of what it is for (`seed, epoch, sample, purpose, counter`), so worker counts, ranks and
resumes cannot change it. NumPy promises no stable streams for `Generator.permutation` and friends across
versions; these functions depend on 64-bit integer arithmetic alone.

The mixer is the finaliser of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
generators", OOPSLA 2014).
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)


class Purpose(IntEnum):
    """What a draw is for; two purposes never share a number. Renumbering changes the order of samples."""

    SHARD_ORDER = 1
    SAMPLE_ORDER = 2
    CROP = 3
    FLIP = 4
    COLOUR = 5
    ERASE = 6
    MIX = 7
    RAND_AUGMENT = 8
    REPLACEMENT = 9
    SHARD_ASSIGNMENT = 10
    MASK = 11


def mix(*parts: int | np.ndarray) -> np.ndarray:
    """Hash integers (or broadcastable integer arrays) to uint64; the order of `parts` matters."""
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            word = (
                np.asarray(part).astype(np.uint64) if not isinstance(part, int) else np.uint64(part % 2**64)
            )
            state = _finalise((state ^ word) + _GAMMA)
    return state


def uniform(*parts: int | np.ndarray) -> np.ndarray:
    """float64 in [0, 1), one for each element of the broadcast `parts`."""
    return (mix(*parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform_table(count: int, *parts: int | np.ndarray) -> np.ndarray:
    """`count` draws in [0, 1) per element: shape (*broadcast shape of parts, count), float64."""
    base = mix(*parts)[..., None]
    return uniform(base, np.arange(count))


def permutation(length: int, *parts: int) -> np.ndarray:
    """A permutation of range(length), int64, by sorting hashes (ties, at 2^-64 a pair, keep their order)."""
    return np.argsort(mix(*parts, np.arange(length)), kind="stable")


def _finalise(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * _M1
    z = (z ^ (z >> np.uint64(27))) * _M2
    return z ^ (z >> np.uint64(31))
