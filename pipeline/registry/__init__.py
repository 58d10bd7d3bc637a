"""What was measured, on what, made from what: immutable events, aliases, and a table view of them."""

from pipeline.registry.events import CheckpointRow, ResultRow, RunRow, results_of
from pipeline.registry.rows import Rows
from pipeline.registry.store import Registry, better_first

__all__ = [
    "Registry",
    "Rows",
    "ResultRow",
    "CheckpointRow",
    "RunRow",
    "better_first",
    "results_of",
]
