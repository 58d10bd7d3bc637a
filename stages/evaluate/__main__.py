"""Evaluate without Ray: `python -m stages.evaluate`, or under torchrun for more ranks."""

from stages.evaluate.config import EvaluateConfig
from stages.evaluate.stage import run
from stages.plain import main

if __name__ == "__main__":
    main(
        EvaluateConfig,
        run,
        stage="evaluate",
        example="python -m stages.evaluate --out OUT --input data=SHARDS --input checkpoint=FINETUNED",
    )
