"""Run functions on Ray: single tasks, streams of tasks, and worker groups through Ray Train.

With `cluster.tune` the only importer of ray, and lazily, so that everything else runs where Ray is not installed.
"""

from cluster.jobs.gauges import publish_gauges
from cluster.jobs.groups import RayExecutor
from cluster.jobs.session import Job, Session

__all__ = ["Job", "RayExecutor", "Session", "publish_gauges"]
