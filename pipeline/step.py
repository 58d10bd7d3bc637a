"""A step: frozen data plus a plain function. Pure: nothing here reads or writes anything.

Identity is the config (less the fields that say where and how fast), the function's name and the
fingerprints of the inputs. Roots, GPU counts, worker counts and hosts are no part of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cluster import storage
from cluster.errors import ConfigError
from cluster.resources import Resources
from stages.artifacts import Outcome
from stages.config import Config, nearest

StageFunction = Callable[..., Outcome]  # (config, inputs, context) -> Outcome


@dataclass(frozen=True, kw_only=True)
class Step:
    """One node of a recipe's graph.

    Args:
        kind: the stage: shard, pretrain, finetune, evaluate.
        name: which one of that stage.
        version: raise it to make the output anew beside the old one.
        fn: the stage's `run(config, inputs, context)`.
        config: what the output depends on.
        inputs: the steps whose artifacts `fn` receives, by the name it expects.
        resources: what it runs on; never identity.
        retries: how often it is tried again after its process died or storage was away.
        labels: how it differs from its siblings, by axis (resolution, seed, …), for tables; never identity.
    """

    kind: str
    name: str
    version: str = "v1"
    fn: StageFunction
    config: Config
    inputs: Mapping[str, Step] = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)
    retries: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.name}/{self.version}"

    def output(self, root: str) -> str:
        """URI of the output folder under `root`."""
        return storage.join(root, self.kind, self.name, self.version)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the fingerprint covers, JSON-ready."""
        return {
            "function": f"{self.fn.__module__}.{self.fn.__qualname__}",
            "config": self.config.identity(),
            "inputs": {name: step.fingerprint for name, step in sorted(self.inputs.items())},
        }

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over the canonical JSON of the identity."""
        return hashlib.sha256(storage.canonical_json(self.identity)).hexdigest()


def topological(steps: Iterable[Step]) -> list[Step]:
    """The steps and everything they need, inputs first; raises ConfigError for two steps with one id."""
    order: dict[str, Step] = {}

    def visit(step: Step) -> None:
        if step.id in order:
            if order[step.id].fingerprint != step.fingerprint:
                raise ConfigError(
                    f"two steps of the recipe share the output '{step.id}' but differ",
                    remedy="give one of them another name or version",
                )
            return
        for needed in step.inputs.values():
            visit(needed)
        order[step.id] = step

    for step in steps:
        visit(step)
    return list(order.values())


def select(steps: list[Step], patterns: list[str]) -> list[Step]:
    """The steps whose id equals a pattern, begins with it, or has it as kind or name; with their inputs.

    Raises ConfigError when a pattern fits none.
    """
    chosen = []
    for pattern in patterns:
        hits = [
            s
            for s in steps
            if pattern in (s.id, s.kind, s.name) or s.id.startswith(pattern.rstrip("/") + "/")
        ]
        if not hits:
            raise ConfigError(
                f"--only {pattern!r} fits no step", remedy=nearest(pattern, [s.id for s in steps])
            )
        chosen += hits
    return topological(chosen)
