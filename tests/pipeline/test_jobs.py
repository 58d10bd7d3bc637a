"""Jobs as data: grids, names that stay, values that reach the config, graphs of the recipes."""

from __future__ import annotations

import pytest

from cluster.errors import ConfigError
from pipeline import recipes
from pipeline.recipes._jobs import Grid, Job, configured, expand, labels
from pipeline.step import topological
from stages.finetune.config import FinetuneConfig

SHA = "a" * 64


def names(grid: Grid, *jobs: Job) -> list[str]:
    return [job.name for job in expand(grid, jobs)]


def test_grid_is_every_combination_and_the_seed_comes_last() -> None:
    grid = Grid(seed=(0, 1), lr=(1e-4, 5e-5), resolution=(224, 384), checkpoint=("a",))
    found = names(grid)
    assert len(found) == len(set(found)) == 8
    assert found[0] == "a-224px-lr0.0001-s0" and found[-1] == "a-384px-lr5e-05-s1"


def test_a_further_value_leaves_the_names_that_were_there() -> None:
    before = names(Grid(lr=(1e-4,), seed=(0,)), Job(resolution=512))
    after = names(Grid(lr=(1e-4, 2e-4), seed=(0, 1)), Job(resolution=512))
    assert before == ["lr0.0001-s0", "512px"] and set(before) < set(after)


def test_jobs_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two jobs are called '224px'"):
        names(Grid(resolution=(224,)), Job(resolution=224))


def test_without_a_grid_there_is_one_job_with_the_recipe_s_values() -> None:
    base = FinetuneConfig()
    [job] = expand(Grid())
    assert job.name == "job" and configured(base, job) == base


def test_every_axis_reaches_the_config() -> None:
    job = Job(
        resolution=384, tokens="fast", train="head", lr=3e-4, layer_decay=0.7, drop_path=0.3, weight_decay=0.2,
        ema_decay=0.5, epochs=7, seed=9, more={"mix.mixup": 0.1},
    )  # fmt: skip
    config = configured(FinetuneConfig(), job)
    assert (config.backbone.img_size, config.data.view.size, config.train) == (384, 384, "head")
    assert (config.optimiser.lr, config.optimiser.layer_decay, config.optimiser.weight_decay) == (
        3e-4,
        0.7,
        0.2,
    )
    assert (config.backbone.drop_path, config.ema_decay, config.schedule.epochs) == (0.3, 0.5, 7)
    assert (config.seed, config.mix.mixup) == (9, 0.1)
    assert config.backbone.migration and config.backbone.gathering
    dense = configured(config, Job(tokens="dense"))
    assert dense.backbone.migration is None and dense.backbone.gathering is None
    assert labels(job)["mix.mixup"] == "mixup0.1"
    unused = {"name", "checkpoint", "more", "tokens", "resolution"}
    assert all(getattr(job, axis) is not None for axis in set(Job.model_fields) - unused), (
        "this test names all"
    )


def test_a_value_that_does_not_fit_names_the_job() -> None:
    [job] = expand(Grid(resolution=(225,)))
    with pytest.raises(ConfigError, match="job '225px'"):
        configured(FinetuneConfig(), job)
    with pytest.raises(ConfigError, match="did you mean 'mixup'"):
        configured(FinetuneConfig(), Job(more={"mix.mixpu": 1}))


def graph(name: str, **assignments: str) -> dict[str, object]:
    module = recipes.load(name)
    config = module.Recipe().with_set({key.replace("__", "."): value for key, value in assignments.items()})
    return {step.id: step for step in topological(module.build(config))}


def test_downstream_grid_from_the_command_line() -> None:
    steps = graph(
        "downstream_base", checkpoints__base__uri="/w/b.pth", checkpoints__base__sha256=SHA,
        grid__resolution="[224,640]", grid__lr="[1e-4]", jobs='[{"name":"probe","train":"head"}]',
    )  # fmt: skip
    assert {i for i in steps if i.startswith("finetune")} == {
        "finetune/downstream-base-224px-lr0.0001-s0/v1",
        "finetune/downstream-base-640px-lr0.0001-s0/v1",
        "finetune/downstream-probe/v1",
    }
    judged = steps["evaluate/downstream-base-640px-lr0.0001-s0/v1"]
    assert (judged.config.data.view.size, judged.config.data.view.crop_pct) == (640, 1.0)
    assert steps["evaluate/downstream-base-224px-lr0.0001-s0/v1"].config.data.view.crop_pct == 0.875


def test_grid_over_several_checkpoints_and_scratch() -> None:
    two = f'{{"a":{{"uri":"a.pth","sha256":"{SHA}"}},"b":{{"uri":"b.pth","sha256":"{"b" * 64}"}}}}'
    steps = graph("downstream_tiny", checkpoints=two, grid='{"checkpoint":["a","b","scratch"],"seed":[0]}')
    tuned = {i: s for i, s in steps.items() if i.startswith("finetune")}
    assert len(tuned) == 3 and {i for i in steps if i.startswith("import")} == {"import/a/v1", "import/b/v1"}
    assert "init" not in tuned["finetune/downstream-scratch-s0/v1"].inputs
    with pytest.raises(ConfigError, match="starts from a checkpoint that the recipe does not have"):
        graph("downstream_tiny", checkpoints=two, grid='{"checkpoint":["c"]}')


def test_a_checkpoint_is_its_bytes_wherever_it_lies() -> None:
    def fingerprint(uri: str, sha256: str) -> str:
        given = {"checkpoints__base__uri": uri, "checkpoints__base__sha256": sha256}
        return graph("downstream_base", **given)["import/base/v1"].fingerprint

    assert fingerprint("/here/b.pth", SHA) == fingerprint("s3://there/c.pth", SHA)
    assert fingerprint("/here/b.pth", SHA) != fingerprint("/here/b.pth", "b" * 64)


@pytest.mark.parametrize(
    ("name", "sizes", "lr", "decay", "batch", "epochs"),
    [
        ("tiny", {224, 384, 512}, 1e-4, 0.8, 1024, 100),
        ("small", {224, 384, 512}, 1e-4, 0.9, 1024, 100),
        ("base", {224, 512}, 1e-4, 0.9, 1024, 20),
        ("large", {640}, 5e-5, 0.95, 512, 20),
    ],
)
def test_downstream_recipes_hold_the_published_values(name, sizes, lr, decay, batch, epochs) -> None:
    tuned = [s.config for i, s in graph(f"downstream_{name}").items() if i.startswith("finetune")]
    assert {c.backbone.img_size for c in tuned} == sizes
    for c in tuned:
        assert (c.optimiser.lr, c.optimiser.layer_decay, c.global_batch) == (lr, decay, batch)
        assert (c.schedule.epochs, c.rand_augment, c.ema_decay, c.label_smoothing) == (epochs, 9, 0.9999, 0.1)
