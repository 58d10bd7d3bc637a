"""What runs in which order, and what came of it."""

from pipeline.registry import Registry

__all__ = ["Registry"]
