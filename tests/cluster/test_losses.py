"""What is a lost worker, and which of the errors of a group's ranks is told."""

from __future__ import annotations

import pytest
import ray.exceptions
import torch
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from cluster import storage
from cluster.errors import (
    ConfigError,
    DataInvalid,
    ItpnError,
    StepFailed,
    Stopped,
    StorageUnavailable,
    WorkerLost,
)
from cluster.losses import Restarts, cause_of, told

DIED = WorkerHealthCheckFailedError("no answer", ray.exceptions.ActorDiedError())
BROKEN = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
NCCL = torch.distributed.DistBackendError("NCCL error: remote process exited")
DEFECT = ValueError("seven is no colour")
# As CUDA and NCCL say it: the first line, then torch's advice.
ADVICE = """
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""
ASSERTED = torch.AcceleratorError("CUDA error: device-side assert triggered" + ADVICE)
ECC = torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered" + ADVICE)
REMOTE = torch.distributed.DistBackendError(
    "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
)
MISUSED = torch.distributed.DistBackendError(
    "NCCL error in: NCCLUtils.cpp:94, invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.27.5\n"
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
    "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 6000"
)
UNHANDLED = torch.distributed.DistBackendError(
    "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\nCuda failure 710 'device-side assert triggered'"
)
FULL = StepFailed("rank 1 could not write the checkpoint of step 8", found="No space left on device")


def from_a_task(error: Exception) -> Exception:
    """The error as Ray hands it over from a task."""
    return ray.exceptions.RayTaskError("fn", "Traceback …", error).as_instanceof_cause()


@pytest.mark.parametrize(
    "error",
    [
        DIED, BROKEN, NCCL, ray.exceptions.WorkerCrashedError(), ray.exceptions.OutOfMemoryError("killed"),
        ray.exceptions.ActorUnavailableError("no answer", None), ECC, REMOTE,
        from_a_task(BROKEN), from_a_task(NCCL), from_a_task(ECC),
        *(
            torch.AcceleratorError(f"CUDA error: {text}{ADVICE}")
            for text in (
                "unspecified launch failure", "an illegal memory access was encountered", "unknown error",
                "uncorrectable NVLink error detected during the execution", "no CUDA-capable device is detected",
                "CUDA-capable device(s) is/are busy or unavailable",
            )
        ),
    ],
)  # fmt: skip
def test_gone_processes_devices_and_peers_are_lost_workers(error: Exception) -> None:
    assert type(told(error, "rank 0")) is WorkerLost


@pytest.mark.parametrize(
    "error",
    [
        DEFECT, from_a_task(DEFECT), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("shapes differ"),
        ray.exceptions.RuntimeEnvSetupError("no such file"), ray.exceptions.RayError("it is not serializable"),
    ],
)  # fmt: skip
def test_what_would_come_again_is_no_lost_worker(error: Exception) -> None:
    assert type(told(error, "rank 0")) is StepFailed


@pytest.mark.parametrize("text", ["device-side assert triggered", "invalid configuration argument"])
def test_what_a_device_refuses_ends_at_once_with_its_words(text: str) -> None:
    error = torch.AcceleratorError(f"CUDA error: {text}{ADVICE}")
    found = told(error, "rank 0")
    assert type(found) is StepFailed and f"CUDA error: {text}" in str(found)
    assert type(told(from_a_task(error), "rank 0")) is StepFailed


@pytest.mark.parametrize(("error", "text"), [(MISUSED, "Duplicate GPU"), (UNHANDLED, "assert triggered")])
def test_nccl_that_is_used_wrongly_is_no_lost_peer(error: Exception, text: str) -> None:
    found = told(error, "rank 0")
    assert type(found) is StepFailed and text in str(found)


@pytest.mark.parametrize("error", [FULL, DataInvalid("a"), ConfigError("b"), WorkerLost("c"), Stopped("d")])
def test_error_of_ours_stays_what_it_is(error: ItpnError) -> None:
    for wrapped in (error, from_a_task(error)):
        found = told(wrapped, "rank 0")
        assert (type(found), str(found)) == (type(error), str(error))


@pytest.mark.parametrize(
    ("failures", "kind"),
    [
        ({0: BROKEN, 1: FULL}, StepFailed),
        ({0: DIED, 1: DataInvalid("a shard is broken")}, DataInvalid),
        ({0: StorageUnavailable("away"), 1: DataInvalid("a shard is broken")}, DataInvalid),
        ({0: BROKEN, 1: StorageUnavailable("away")}, StorageUnavailable),
        ({0: BROKEN, 1: DIED}, WorkerLost),
        ({0: BROKEN, 1: DEFECT}, StepFailed),
        ({0: DEFECT, 1: DIED}, WorkerLost),  # what it said of a peer's death may have no class
        ({0: Stopped("saved"), 1: DIED}, Stopped),
        ({0: ASSERTED, 1: DIED}, StepFailed),  # the watchdog ended rank 1, whose device asserted too
        ({0: ASSERTED, 1: DataInvalid("a shard is broken")}, DataInvalid),
        ({0: ECC, 1: REMOTE}, WorkerLost),
        ({}, WorkerLost),
    ],
)
def test_cause_goes_before_what_came_of_it(failures: dict[int, Exception], kind: type[ItpnError]) -> None:
    for order in (failures, dict(reversed(failures.items()))):
        found = cause_of(order, "the group failed")
        assert type(found) is kind
        assert "gloo" not in str(found) or kind is WorkerLost


def test_restarts_are_granted_in_a_row_and_anew_after_progress(tmp_path) -> None:
    restarts = Restarts(most=2, marks=str(tmp_path))
    lost = WorkerLost("gone")
    assert [restarts.grant(lost) for _ in range(2)] == [True, True]
    (tmp_path / "4.json").touch()
    assert [restarts.grant(lost) for _ in range(3)] == [True, True, False], (
        "a committed checkpoint ends the row"
    )
    (tmp_path / "files" / "8-x").mkdir(parents=True)
    (tmp_path / "files" / "8-x" / "common.json").touch()
    assert not restarts.grant(lost), "an upload without its manifest is no progress"
    (tmp_path / "4.json").unlink()
    assert not restarts.grant(lost), "what retention removed is no progress"
    assert [Restarts(most=1).grant(lost)] == [True]


def test_losses_while_the_store_is_away_are_counted_apart_until_it_tells(tmp_path, monkeypatch) -> None:
    restarts, lost = Restarts(most=2, marks=str(tmp_path)), StorageUnavailable("it does not answer")
    assert [restarts.grant(lost) for _ in range(2)] == [True, True]

    def away(*_: object) -> None:
        raise StorageUnavailable("it does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "list_files", away)
        assert [restarts.grant(lost) for _ in range(3)] == [True, True, False]
        other = Restarts(most=2, marks=str(tmp_path))
        assert other.grant(lost)
    (tmp_path / "4.json").touch()
    assert restarts.grant(lost), "there had been progress"
    (tmp_path / "4.json").unlink()
    assert [other.grant(lost), other.grant(lost)] == [True, False], "there had been none"
