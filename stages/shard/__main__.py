"""Shard a data set without Ray: `python -m stages.shard --out OUT --set name=mine --set source=FOLDER`."""

from stages.plain import main
from stages.shard.config import ShardConfig
from stages.shard.stage import run

if __name__ == "__main__":
    main(
        ShardConfig,
        run,
        stage="shard",
        example="python -m stages.shard --out OUT --set name=clipart-12 --set source=assets/clipart-12.tar",
    )
