"""Where a training run keeps things below its output folder. Imports nothing heavy: `itpn status` reads here too.

checkpoints/<step:09d>.json             manifest of a complete checkpoint, created exclusively and last
checkpoints/files/<step>-<attempt>/…    what the ranks wrote
metrics/<step>-<attempt>.jsonl          the metrics since the checkpoint before
tensorboard/events.out.tfevents.…       event files, one for each checkpoint
pictures/<step>-<attempt>.png           what the model does
"""

from __future__ import annotations

from cluster import storage

CHECKPOINTS, METRICS, TENSORBOARD, PICTURES = "checkpoints", "metrics", "tensorboard", "pictures"


def manifest_uri(out: str, step: int) -> str:
    """Where the manifest of one step lies."""
    return storage.join(out, CHECKPOINTS, f"{step:09d}.json")


def checkpoint_steps(out: str) -> list[int]:
    """Steps of all committed checkpoints, oldest first."""
    names = (info.uri.rsplit("/", 1)[1] for info in storage.list_files(storage.join(out, CHECKPOINTS)))
    found = (name.removesuffix(".json") for name in names if name.endswith(".json"))
    return sorted({int(name) for name in found if len(name) == 9 and name.isdigit()})
