"""Which errors mean that a worker was lost, so that a new start may mend it, and how many starts are given.

Looks at classes by their names, and at what CUDA, HIP and NCCL say: neither ray nor torch need be installed, or
imported, to tell.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cluster import storage
from cluster.errors import ItpnError, StepFailed, Stopped, StorageUnavailable, WorkerLost

log = logging.getLogger(__name__)

# What Ray says of its processes and nodes.
_GONE = {"RayError", "RayTrainError"}
# These derive from RayError too, but hold an error of the task's own code, or would come again.
_NOT_GONE = {
    "RayTaskError", "UserExceptionWithTraceback", "UserCodeException", "TaskCancelledError",
    "RuntimeEnvSetupError", "TaskUnschedulableError", "ActorUnschedulableError",
}  # fmt: skip
# torch says AcceleratorError of all that a device refuses: these texts (of cudaGetErrorString, HIP's are the same) mean
# that it failed. Illegal accesses and instructions come of defects, but of failing memory and links too (Xid 31, 13):
# a few starts tell which. What else it says (a device-side assert, an invalid configuration) would come again.
_DEVICE_FAILED = (
    "uncorrectable ECC error", "uncorrectable NVLink error", "hardware stack error", "unspecified launch failure",
    "an illegal memory access was encountered", "an illegal instruction was encountered", "unknown error",
    "the launch timed out", "is/are busy or unavailable", "no CUDA-capable device", "system not yet initialized",
    "or a hardware error", "GPU is lost",
)  # fmt: skip
# What a broken collective may say that is no peer's doing, and would come again.
_MISUSED = ("device-side assert", "ncclInvalidUsage", "ncclInvalidArgument")


@dataclass
class Restarts:
    """Counts the losses of a group, or of a single worker, and grants new starts.

    Args:
        most: so many in a row, which means without anything new in `marks` between them.
        marks: a folder where work that is safe leaves a JSON file, such as the manifest of a training's checkpoint. A
            run of weeks meets more faults than `most`, but goes on in between; a fault that comes again at the same
            place does not.
    """

    most: int = 3
    marks: str | None = None
    used: int = 0
    _blind: int = (
        0  # losses while the store was away, of which it is not known whether there was progress between
    )
    _seen: frozenset[str] = frozenset()

    def grant(self, error: ItpnError) -> bool:
        """Whether there is another start after `error`."""
        now = self._look()
        if now is None:
            self._blind += 1
        else:
            self.used = 1 if now - self._seen else self.used + self._blind + 1
            self._blind, self._seen = 0, self._seen | now
        count = self._blind or self.used
        if count > self.most:
            return False
        log.warning("restart %d of %d: %s", count, self.most, error)
        return True

    def _look(self) -> frozenset[str] | None:
        """The marks; None when the store does not tell. Files below folders are no marks: an upload that came to
        nothing leaves such."""
        if self.marks is None:
            return frozenset()
        folder = storage.join(self.marks)
        try:
            uris = [info.uri for info in storage.list_files(folder)]
        except StorageUnavailable:
            return None
        return frozenset(uri for uri in uris if uri.endswith(".json") and uri.rpartition("/")[0] == folder)


def told(error: BaseException, name: str) -> ItpnError:
    """`error` as one of ours: the ItpnError inside whatever Ray wrapped it in, if there is one.

    Else WorkerLost when a process, a node, a device or a peer is gone; and StepFailed, with the end of its text, for
    what the code of `name` raised and we have no class for: a defect, which another start would meet again.
    """
    chain = list(_chain(error))
    # Ray's wrapper poses as the class it wraps; the wrapped error itself comes after it.
    ours = [link for link in chain if isinstance(link, ItpnError) and getattr(link, "cause", None) is None]
    if ours:
        return ours[0]
    lost = [link for link in chain if _gone(link) or _peer_gone(link)]
    if lost:
        return WorkerLost(
            f"the worker process of '{name}' died" if _gone(lost[-1]) else f"'{name}' lost its peers",
            found=(str(lost[-1]).strip().splitlines() or [type(lost[-1]).__name__])[0],
            remedy="run again: it resumes; if it repeats, look for an out-of-memory kill (dmesg)",
        )
    lines = str(error).strip().splitlines() or traceback.format_exception_only(error)
    return StepFailed(f"'{name}' failed", found="\n            ".join(line.rstrip() for line in lines[-12:]))


def cause_of(failures: Mapping[int, BaseException], text: str) -> ItpnError:
    """The error of a group: what is behind those of its ranks.

    When a rank raises or dies, the others fail on their next collective, with errors of several kinds. So an error of
    ours counts most, among those the ones that another start cannot mend; then what a device refused, which no death
    elsewhere brings about (but NCCL's watchdog ends the process of a rank that it happens to); then a death; then a
    defect; then broken collectives, which are WorkerLost too.

    Args:
        failures: by rank; empty when the group as a whole failed.
        text: what was said of the group.
    """
    causes = {rank: told(failure, f"rank {rank}") for rank, failure in sorted(failures.items())}

    def weight(rank: int) -> int:
        cause, chain = causes[rank], list(_chain(failures[rank]))
        if any(isinstance(link, ItpnError) for link in chain):
            return {WorkerLost: 2, Stopped: 4, StorageUnavailable: 5}.get(type(cause), 6)
        if isinstance(cause, StepFailed) and any(_of_class(link, "AcceleratorError") for link in chain):
            return 3
        return 2 if any(map(_gone, chain)) else 0 if isinstance(cause, WorkerLost) else 1

    first = max(causes, key=weight, default=None)
    if first is not None and not isinstance(causes[first], WorkerLost):
        return causes[first]
    found = "; ".join(f"rank {rank}: {cause.found or cause.message}" for rank, cause in causes.items())
    return WorkerLost(
        "a worker of the group was lost",
        found=found or (text.strip().splitlines() or ["nothing was said"])[-1],
        remedy="run again: it resumes; if it repeats, look for out-of-memory kills (dmesg)",
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and, one inside the other, those that it was made of."""
    seen: object = error
    while isinstance(seen, BaseException):
        yield seen
        inner = getattr(seen, "cause", None) or getattr(seen, "health_check_failure", None)
        seen = inner or seen.__cause__


def _of_class(error: BaseException, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(error).__mro__)


def _gone(error: BaseException) -> bool:
    """Whether a process, its node or its device failed. A bare RayError stands for one that could not be sent."""
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & _NOT_GONE or type(error).__name__ == "RayError":
        return False
    if "AcceleratorError" in names:
        return any(text in str(error) for text in _DEVICE_FAILED)
    return bool(names & _GONE)


def _peer_gone(error: BaseException) -> bool:
    """Whether a collective broke, or reached its time limit, since a peer is gone or late."""
    if _of_class(error, "DistError"):
        return not any(text in str(error) for text in _MISUSED)
    # gloo's errors are bare RuntimeErrors that begin with the place in its source.
    return isinstance(error, RuntimeError) and "gloo" in str(error).lower()
