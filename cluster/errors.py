"""The errors a user can meet, one base class, and the exit code of each.

Exit codes: 1 a step failed, 2 bad config or failed preflight, 3 lease held, 4 storage unavailable,
5 data invalid, 6 training diverged. 0 is success.
"""

from __future__ import annotations

import pickle


class ItpnError(Exception):
    """Base of every error that is told to the user.

    The message names the object and what is wrong with it; `expected`, `found` and `remedy` complete
    it, each on a line of its own.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
    ) -> None:
        self.message, self.expected, self.found, self.remedy = message, expected, found, remedy
        lines = [message]
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if found is not None:
            lines.append(f"  found:    {found}")
        if remedy is not None:
            lines.append(f"  remedy:   {remedy}")
        super().__init__("\n".join(lines))

    def __reduce__(self):
        # Exceptions with keyword-only arguments do not pickle by default, and these cross process borders.
        return _rebuild, (type(self), self.message, self.expected, self.found, self.remedy)


def _rebuild(
    cls: type[ItpnError], message: str, expected: object, found: object, remedy: str | None
) -> ItpnError:
    return cls(message, expected=expected, found=found, remedy=remedy)


class StepFailed(ItpnError):
    """A step ended with an error that no other class describes."""

    exit_code = 1


class WorkerLost(StepFailed):
    """A process of the step, its node or a peer is gone for a reason that is no error of ours: a restart may help."""


class ConfigError(ItpnError):
    """A config value, recipe name, flag or combination of them is not valid."""

    exit_code = 2


class PreflightError(ItpnError):
    """Something that the run needs is missing; the message lists everything that is."""

    exit_code = 2


class DriftError(ConfigError):
    """A finished or begun output was made from another config than the one asked for."""


class LeaseHeld(ItpnError):
    """Another process holds the lease of this step."""

    exit_code = 3


class StorageUnavailable(ItpnError):
    """The object store did not answer within the deadline, or refuses access."""

    exit_code = 4


class StorageRefused(StorageUnavailable):
    """The store answered that it will not do this: no rights, no such bucket, an operation that it lacks."""


class AlreadyExists(ItpnError):
    """An exclusive create met an object that is already there."""

    exit_code = 4


class DataInvalid(ItpnError):
    """Input data are missing, broken, or differ from their manifest."""

    exit_code = 5


class NotFound(DataInvalid):
    """No object has this name."""


class TrainingDiverged(ItpnError):
    """Training met non-finite values again after the allowed number of roll-backs."""

    exit_code = 6


class Stopped(ItpnError):
    """The work was asked to stop (SIGTERM, preemption) and has saved its state; it is not finished."""

    exit_code = 0


def portable(error: Exception) -> Exception:
    """The error itself if another process could raise it (it survives pickling), else a StepFailed that tells it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return StepFailed(f"{type(error).__name__}: {error}")
    return error
