"""Every `--set KEY=…` that an error proposes names a key of the recipes that can meet the error."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from pipeline import preflight, recipes
from stages.config import Config
from stages.evaluate.config import EvaluateConfig
from stages.finetune.config import FinetuneConfig

REPOSITORY = Path(__file__).resolve().parents[2]
PLAIN = re.compile(r"`--set ([\w.]+)=[^`]*` of python -m stages\.(\w+)")
SETTING = re.compile(r"--set '?([\w.]+)=")
STAGES = {"evaluate": EvaluateConfig, "finetune": FinetuneConfig}
GIVEN = ["downstream_base", "downstream_large", "downstream_micro", "evaluate"]
TRAINED = ["pretrain_base", "pretrain_large"]
# Where errors are made, and the recipes that reach them.
PLACES = {
    "stages/evaluate": [*GIVEN, *TRAINED, "demo", "demo_table"],
    "stages/finetune": [*GIVEN[:-1], *TRAINED, "demo", "demo_table"],
    "stages/adopt": GIVEN,
    "pipeline/given.py": GIVEN,
    "pipeline/search.py": [*GIVEN[:-1], *TRAINED],
    "pipeline/recipes/_other_sets.py": [*GIVEN, *TRAINED],
    "pipeline/recipes/_jobs.py": [*GIVEN[:-1], *TRAINED],
    "pipeline/recipes/_imagenet.py": TRAINED,
    "docs/evaluation.md": ["downstream_base"],
    **{f"pipeline/recipes/{name}.py": [name] for name in (*GIVEN, *TRAINED)},
}


def texts(path: Path) -> list[str]:
    """A document's text, or every string of a module; what an f-string fills in is NAME."""
    if path.suffix == ".md":
        return [path.read_text()]
    parts = {ast.FormattedValue: lambda _: "NAME", ast.Constant: lambda node: str(node.value)}
    return [
        "".join(
            parts[type(part)](part) for part in (node.values if isinstance(node, ast.JoinedStr) else [node])
        )
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    ]


def has(config: Config, key: str) -> bool:
    """Whether `--set` finds the key; NAME stands for whatever there is."""
    found = config.model_dump(mode="json")
    for part in key.split("."):
        if not isinstance(found, dict) or (part not in found and part != "NAME"):
            return False
        found = next(iter(found.values())) if part == "NAME" else found[part]
    return True


@pytest.mark.parametrize("place", PLACES)
def test_every_setting_that_a_text_proposes_is_one(place: str) -> None:
    path, checked = REPOSITORY / place, 0
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        for text in texts(file):
            for key, stage in PLAIN.findall(text):
                assert has(STAGES[stage](), key), f"{file}: {key}"
                checked += 1
            for key in SETTING.findall(PLAIN.sub("", text)):
                if file.name == "__main__.py":
                    assert has(STAGES[file.parent.name](), key), f"{file}: {key}"
                    continue
                for name in PLACES[place]:
                    assert has(recipes.load(name).Recipe(), key), f"{file}: {key} is no key of {name}"
                checked += 1
    assert checked or place in ("stages/finetune", "pipeline/given.py", "stages/adopt")


@pytest.mark.parametrize("name", [*GIVEN, *TRAINED])
def test_what_is_missing_is_mended_by_settings_of_the_recipe(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "_local_gpus", lambda: 0)
    module = recipes.load(name)
    config = module.Recipe()
    if "evaluate_workers" in type(config).model_fields:
        config = config.with_set({"gpus_per_worker": "1"})
    found = [f for f in preflight.examine(module.requirements(config, None)) if not f.ok]
    assert "GPUs" in {f.name for f in found} and len(found) > 1
    keys = [key for f in found for key in SETTING.findall(f.remedy)]
    assert len(keys) > 1
    for key in keys:
        try:
            config.with_set({key: "null"})
        except ConfigError as error:
            assert "unknown key" not in error.message, f"{name}: {key}"
