"""Checks before anything runs: every missing thing is listed with its remedy, not only the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster import storage
from cluster.errors import ItpnError, PreflightError
from cluster.resources import Resources
from stages.train.config import LoopConfig
from stages.train.launch import world_sizes

ANSWER_S = 20.0  # how long a store may take to answer the first question


@dataclass(frozen=True)
class Requirement:
    """Something a recipe needs.

    Args:
        name: what it is.
        check: returns what was found when it is there, and raises ItpnError when it is not.
        kinds: the kinds of steps that need it; a run whose steps of these kinds are done does not ask.
    """

    name: str
    check: Callable[[], str]
    kinds: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Finding:
    """What a check came to."""

    name: str
    ok: bool
    text: str
    remedy: str = ""
    exit_code: int = 2


def examine(requirements: list[Requirement]) -> list[Finding]:
    """Run every check; none stops the others."""
    findings = []
    for requirement in requirements:
        try:
            findings.append(Finding(requirement.name, True, requirement.check()))
        except ItpnError as error:
            text = error.message if error.found is None else f"{error.message} (found: {error.found})"
            findings.append(Finding(requirement.name, False, text, error.remedy or "", error.exit_code))
    return findings


def demand(requirements: list[Requirement]) -> None:
    """Raise PreflightError that lists everything that is missing."""
    missing = [finding for finding in examine(requirements) if not finding.ok]
    if missing:
        lines = [f"  - {f.name}: {f.text}\n      remedy: {f.remedy}" for f in missing]
        count = f"{len(missing)} thing is" if len(missing) == 1 else f"{len(missing)} things are"
        raise PreflightError(f"{count} missing:\n" + "\n".join(lines))


def gpus(wanted: Mapping[str, int], address: str | None = None) -> Requirement:
    """As many GPUs in the Ray cluster at `address`, or on this machine without one, as its largest step asks for.

    `wanted` maps the settings that ask for GPUs to how many; those that ask for too many are named in the remedy.
    """

    def check() -> str:
        found = _cluster_gpus(address) if address else _local_gpus()
        above = [name for name, count in wanted.items() if count > found]
        if above:
            raise PreflightError(
                f"{max(wanted.values())} GPUs are needed",
                found=f"{found} {'in the cluster' if address else 'on this machine'}",
                remedy="run on a GPU machine, join a cluster with --address HOST:PORT (or RAY_ADDRESS), "
                f"or ask for fewer with {' '.join(f'--set {name}=N' for name in above)}",
            )
        return f"{found} GPUs"

    return Requirement("GPUs", check, frozenset({"pretrain", "finetune", "evaluate"}))


def shares(kind: str, resources: Resources, loop: LoopConfig, streams: int) -> Requirement:
    """Ranks of a step of `kind` that can share its data and its batch evenly."""

    def check() -> str:
        return f"{' or '.join(str(n) for n in world_sizes(resources, loop, streams))} ranks"

    return Requirement(f"ranks of {kind}", check, frozenset({kind}))


def readable(name: str, uri: str, remedy: str, kind: str, *, folder: bool = True) -> Requirement:
    """An object, or (where `folder` allows it) a folder, that steps of `kind` read."""

    def check() -> str:
        if not uri:
            raise PreflightError("not given", remedy=remedy)
        if storage.exists(uri):
            return uri
        inside = storage.list_files(uri, most=1)
        if inside and not folder:
            raise PreflightError("not a file", found=f"a folder at {uri}", remedy=remedy)
        if not inside:
            raise PreflightError("not there", found=f"nothing at {uri}", remedy=remedy)
        return uri

    return Requirement(name, check, frozenset({kind}))


def teacher(uri: str, remedy: str, kind: str = "pretrain") -> Requirement:
    """A teacher: a file, a folder, or the name of a repository of the Hugging Face hub."""
    here = readable("teacher", uri, remedy, kind)

    def check() -> str:
        from stages.model.teacher import hub_name, on_hub

        if not uri or (name := hub_name(uri)) is None:
            return here.check()
        if not on_hub(name):
            found = f"no path {uri}, and no repository of that name in the hub that this machine can read"
            raise PreflightError("not there", found=found, remedy=remedy)
        return f"{name} of the Hugging Face hub"

    return Requirement(here.name, check, here.kinds)


def root(uri: str | None) -> Requirement:
    """The root must be given, answer, and really refuse a second exclusive create."""

    def check() -> str:
        if not uri:
            raise PreflightError(
                "not given", remedy="--root URI (or ROOT=URI with make), e.g. s3://bucket/itpn"
            )
        storage.probe_preconditions(uri)
        return f"{uri} answers and refuses a second exclusive create"

    return Requirement("root", check)


def _local_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _cluster_gpus(address: str) -> int:
    from cluster.jobs import Session

    session = Session(address)
    try:
        return int(session.capacity().get("GPU", 0))
    finally:
        session.close()
