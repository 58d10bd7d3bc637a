"""Fine-tune without Ray: `python -m stages.finetune`, or under torchrun for more ranks."""

from stages.finetune.config import FinetuneConfig
from stages.finetune.stage import run
from stages.plain import main

if __name__ == "__main__":
    main(
        FinetuneConfig,
        run,
        stage="finetune",
        example="torchrun --nproc-per-node 2 -m stages.finetune --out OUT --input data=SHARDS "
        "--set backbone=fast_itpn_tiny --input init=PRETRAINED",
    )
