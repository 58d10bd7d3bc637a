"""One rank of an evaluation as a script: `python rank.py SPEC.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cluster.resources import Resources
from stages.artifacts import parse_artifact
from stages.context import StageContext
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.stage import run

if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    context = StageContext(out=spec["out"], attempt="a", resources=Resources(workers=spec["ranks"]))
    inputs = {name: parse_artifact(value) for name, value in spec["inputs"].items()}
    outcome = run(EvaluateConfig.parse(spec["config"]), inputs, context)
    assert "deepspeed" not in sys.modules, "evaluation must start fast"
    if "result" in spec:
        Path(spec["result"]).write_text(outcome.model_dump_json())
