"""The ImageNet recipes: published values as published, computed hours as the formula gives them."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from pipeline import preflight, recipes
from pipeline.version import REPOSITORY

# Fast-iTPN's fine-tuning: width, depths, heads, batch, lr, epochs, warm-up, layer decay, drop path, top-1.
PUBLISHED = {
    "tiny": (384, (1, 1, 12), 6, 1024, 1e-4, 100, 5, 0.80, 0.1, ("85.1", "86.2", "86.5")),
    "small": (384, (2, 2, 20), 6, 1024, 1e-4, 100, 5, 0.90, 0.1, ("86.4", "86.95", "87.8")),
    "base": (512, (3, 3, 24), 8, 1024, 1e-4, 20, 3, 0.90, 0.1, ("87.4", "88.5")),
    "large": (768, (2, 2, 40), 12, 512, 5e-5, 20, 3, 0.95, 0.2, ("89.5",)),
}


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    """bench/scaling.py, which computes what the documents say."""
    spec = importlib.util.spec_from_file_location("scaling", REPOSITORY / "bench" / "scaling.py")
    assert spec and spec.loader
    module = sys.modules["scaling"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_has_the_published_values(name: str) -> None:
    module = recipes.load(f"pretrain_{name}")
    recipe = module.Recipe()
    width, depths, heads, batch, lr, epochs, warmup, decay, drop_path, top1 = PUBLISHED[name]
    for backbone in (recipe.pretrain.backbone, recipe.finetune.backbone):
        found = (backbone.embed_dim, backbone.depths, backbone.num_heads, backbone.drop_path)
        assert found == (width, depths, heads, drop_path)
    tuning = recipe.finetune
    assert (tuning.global_batch, tuning.optimiser.lr, tuning.optimiser.layer_decay) == (batch, lr, decay)
    assert (tuning.schedule.epochs, tuning.schedule.warmup_epochs, tuning.schedule.min_lr) == (
        epochs,
        warmup,
        1e-6,
    )
    assert (tuning.rand_augment, tuning.colour_jitter, tuning.random_erasing) == (9, 0, 0.25)
    assert (tuning.mix.mixup, tuning.mix.cutmix, tuning.label_smoothing) == (0.8, 1.0, 0.1)
    assert (tuning.ema_decay, tuning.optimiser.weight_decay, tuning.head_init_scale) == (0.9999, 0.05, 0.001)
    assert recipe.pretrain.schedule.epochs == 1600
    for value in (*top1, "unpublished", f"make pretrain-{name}", "not measured"):
        assert value in module.__doc__


@pytest.mark.parametrize("name", PUBLISHED)
def test_student_and_teacher_see_the_same_grid(name: str) -> None:
    recipe = recipes.load(f"pretrain_{name}").Recipe()
    assert recipe.pretrain.backbone.grid == recipe.pretrain.teacher.input_size // 14
    assert recipe.pretrain.data.view.size == recipe.pretrain.backbone.img_size


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_recipe_has_a_graph_that_evaluates_each_resolution(name: str) -> None:
    module = recipes.load(f"pretrain_{name}")
    config = module.Recipe()
    steps = {step.id: step for step in module.build(config)}
    for size in config.grid.resolution:
        tuned = steps.pop(f"evaluate/{name}-{size}px-s0/v1").inputs["checkpoint"]
        assert tuned.config.backbone.img_size == size and tuned.inputs["init"].name == name
    # What is left judges the pre-trained weights themselves.
    assert all(step.inputs["checkpoint"].id == f"pretrain/{name}/v1" for step in steps.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_downstream_recipes_measure_everything_that_needs_no_further_data(name: str) -> None:
    module = recipes.load(f"downstream_{name}")
    config = module.Recipe().with_set({"evaluate_workers": "4"})
    steps = {step.id: step for step in module.build(config)}
    probe = steps.pop(f"evaluate/{name}-features/v1")
    assert probe.inputs["checkpoint"].id == f"import/{name}/v1"
    assert probe.config.data.view.size == config.finetune.backbone.img_size
    assert {each.kind for each in probe.config.evaluators} == {"knn", "linear"}
    assert len(steps) == len(config.grid.resolution)
    for step in steps.values():
        assert {each.kind for each in step.config.evaluators} == {"classification", "speed"}
        assert step.resources.workers == 4 and step.inputs["checkpoint"].resources.workers == 8
    assert probe.resources.workers == 4
    without = module.build(module.Recipe().with_set({"probe": "null"}))
    assert {step.id for step in without} == set(steps)
    assert [s.fingerprint for s in without] == [s.fingerprint for s in steps.values()], (
        "workers are no identity"
    )


def test_evaluations_take_as_many_workers_as_are_asked_for() -> None:
    pretrain = recipes.load("pretrain_base")
    for step in pretrain.build(pretrain.Recipe().with_set({"evaluate_gpus": "2"})):
        assert str(step.resources) == "2 x (8 CPU + 1 GPU)"
    evaluate = recipes.load("evaluate")
    [step] = evaluate.build(evaluate.Recipe().with_set({"evaluate_workers": "3", "gpus_per_worker": "0"}))
    assert str(step.resources) == "3 x (1 CPU)"


@pytest.mark.parametrize("name", PUBLISHED)
def test_hours_in_the_docstring_are_those_of_the_formula(name: str, scaling: ModuleType) -> None:
    module = recipes.load(f"pretrain_{name}")
    recipe = module.Recipe()
    student, teacher = scaling.pretrain_arithmetic(recipe.pretrain)
    total = 3 * student + teacher
    on = {peak: scaling.hours(total, 1600, recipe.gpus, peak) for peak in (scaling.A100, scaling.H100)}
    assert f"{total / 1e9:.0f} GFLOP" in module.__doc__
    assert f"{on[scaling.A100]:.0f} h on A100" in module.__doc__
    assert f"{on[scaling.H100]:.0f} h on H100" in module.__doc__


def test_tables_of_the_scaling_document_are_what_the_formulae_give(scaling: ModuleType) -> None:
    text = scaling.DOCUMENT.read_text()
    for name, make in scaling.TABLES.items():
        assert f"<!-- {name} -->\n" in text
        assert scaling.written(text, name, make()) == text, "run python bench/scaling.py --write"


def findings(monkeypatch: pytest.MonkeyPatch, found: int, **changes: int) -> dict[str, preflight.Finding]:
    """What the preflight of the large recipe says on a machine with so many GPUs."""
    module = recipes.load("pretrain_large")
    monkeypatch.setattr(preflight, "_local_gpus", lambda: found)
    config = module.Recipe.parse(changes)
    return {finding.name: finding for finding in preflight.examine(module.requirements(config, None))}


def test_preflight_names_the_setting_that_asks_for_too_many_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    said = findings(monkeypatch, 4, gpus=4)["GPUs"]
    assert not said.ok and "8 GPUs are needed (found: 4 on this machine)" in said.text
    assert said.remedy.endswith("ask for fewer with --set finetune_gpus=N")
    both = findings(monkeypatch, 4)["GPUs"].remedy
    assert both.endswith("--set gpus=N --set finetune_gpus=N")
    assert findings(monkeypatch, 4, gpus=4, finetune_gpus=2)["GPUs"].ok
    assert findings(monkeypatch, 4, gpus=64, min_gpus=4, finetune_gpus=4)["GPUs"].ok
    judged = findings(monkeypatch, 4, gpus=4, finetune_gpus=4, evaluate_gpus=8)["GPUs"]
    assert judged.remedy.endswith("ask for fewer with --set evaluate_gpus=N")


@pytest.mark.parametrize(
    ("recipe", "values", "remedy"),
    [
        ("downstream_base", {}, "--set gpus_per_worker=N --set finetune_workers=N"),
        ("downstream_base", {"finetune_workers": 1, "gpus_per_worker": 0.5}, "--set gpus_per_worker=N"),
        ("evaluate", {"evaluate_workers": 2}, "--set evaluate_workers=N"),
    ],
)
def test_preflight_of_given_checkpoints_names_settings_that_they_have(
    monkeypatch: pytest.MonkeyPatch, recipe: str, values: dict, remedy: str
) -> None:
    module = recipes.load(recipe)
    monkeypatch.setattr(preflight, "_local_gpus", lambda: 0)
    found = {f.name: f for f in preflight.examine(module.requirements(module.Recipe.parse(values), None))}
    assert found["GPUs"].remedy.endswith(f"ask for fewer with {remedy}")


def test_preflight_refuses_numbers_of_gpus_that_cannot_share_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for count in (1, 2, 4, 8, 16, 32, 64):
        assert findings(monkeypatch, 128, gpus=count)["ranks of pretrain"].ok
    said = findings(monkeypatch, 128, gpus=12, finetune_gpus=3)
    assert (
        not said["ranks of pretrain"].ok
        and "the nearest that can: 8 or 16" in said["ranks of pretrain"].remedy
    )
    assert (
        not said["ranks of finetune"].ok
        and "the nearest that can: 2 or 4" in said["ranks of finetune"].remedy
    )
    assert "the nearest that can: 64;" in findings(monkeypatch, 128, gpus=128)["ranks of pretrain"].remedy
