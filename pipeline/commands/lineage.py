"""The lineage of a result or a checkpoint, as text for people."""

from __future__ import annotations

import json
from textwrap import wrap
from typing import Any

from rich.console import Console
from rich.text import Text

from pipeline.registry.compare import leaves_of
from pipeline.registry.metrics import measure, unit
from pipeline.written import duration, size

_WRAP: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def print_lineage(console: Console, node: dict[str, Any], role: str = "", depth: int = 0) -> None:
    """The tree of `lineage`: each step with what it made, its size, metrics and config, then its inputs."""
    pad = "  " * depth
    name = f"{role + ': ' if role else ''}{node['step']}"
    if node.get("missing"):
        console.print(Text(f"{pad}{name}  (its record is gone)"))
        return
    head = f"{pad}{name}  {node['finished_at'][:19]}  {duration(node['wall_s'])}  code {node['code_version']}"
    console.print(Text(head), soft_wrap=True)
    for key in ("checkpoint", "dataset"):
        if facts := node.get(key):
            uri = facts.get("uri") or facts["manifest"]
            bytes_ = f"  {size(facts['bytes'])}" if "bytes" in facts else ""
            console.print(Text(f"{pad}    {uri}{bytes_}  sha256 {facts['sha256'][:16]}"), soft_wrap=True)
            if facts.get("teacher_sha256"):
                console.print(Text(f"{pad}    teacher sha256 {facts['teacher_sha256'][:16]}"))
            if facts.get("fingerprint"):
                console.print(Text(f"{pad}    content {facts['fingerprint'][:16]}, splits {facts['splits']}"))
    metrics = [
        f"{name} {measure(value, name)} {unit(name)}".rstrip() for name, value in node["metrics"].items()
    ]
    config = [f"{path}={_short(value)}" for path, value in sorted(leaves_of(node["config"]).items())]
    for what, told in (("metrics", metrics), ("config", config)):
        if told:
            first, rest = f"{pad}    {what}: ", pad + " " * 8
            for line in wrap(
                ", ".join(told), console.width, initial_indent=first, subsequent_indent=rest, **_WRAP
            ):
                console.print(Text(line), soft_wrap=True)
    for name, needed in node["inputs"].items():
        print_lineage(console, needed, name, depth + 1)


def _short(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
