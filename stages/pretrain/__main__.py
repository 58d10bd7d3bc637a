"""Pre-train without Ray: `python -m stages.pretrain`, or under torchrun for more ranks."""

from stages.plain import main
from stages.pretrain.config import PretrainConfig
from stages.pretrain.stage import run

if __name__ == "__main__":
    main(
        PretrainConfig,
        run,
        stage="pretrain",
        example="torchrun --nproc-per-node 2 -m stages.pretrain --out OUT --input data=SHARDS "
        "--set backbone=fast_itpn_tiny --set teacher.uri=CLIP --set schedule.epochs=10",
    )
