"""Every `--set KEY=…` that an error proposes names a key of the recipes that can meet the error."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from pipeline import preflight, recipes
from stages.config import Config

REPOSITORY = Path(__file__).resolve().parents[2]
PLAIN = re.compile(r"`--set ([\w.]+)=[^`]*` of python -m stages\.(\w+)")
SETTING = re.compile(r"--set '?([\w.]+)=")
EXAMPLE = re.compile(r"^ {4,}(?:\(or: )?itpn (?:run (\w+)|(finetune|evaluate)) ")
DEMO = recipes.load("demo").Recipe()
STAGES = {"evaluate": DEMO.evaluate, "finetune": DEMO.finetune, "pretrain": DEMO.pretrain, "shard": DEMO.data}
ALL = recipes.names()
DOWNSTREAM = [name for name in ALL if name.startswith("downstream")]
GIVEN = [*DOWNSTREAM, "evaluate"]
TRAINED = [name for name in ALL if name.startswith("pretrain")]
# Where texts propose settings, and the recipes that reach them. Of a program of a stage it is the stage's own config.
PLACES: dict[str, list[str]] = {
    "stages/shard/__main__.py": [],
    "stages/pretrain/__main__.py": [],
    "stages/finetune/__main__.py": [],
    "stages/evaluate": ALL,
    "stages/adopt": GIVEN,
    "pipeline/cli.py": [],
    "pipeline/commands": [],
    "pipeline/preflight.py": ALL,
    "pipeline/record.py": ALL,
    "pipeline/registry/deletions.py": ALL,
    "pipeline/search.py": [*DOWNSTREAM, *TRAINED],
    "pipeline/recipes/_downstream.py": GIVEN,
    "pipeline/recipes/_imagenet.py": TRAINED,
    "pipeline/recipes/_jobs.py": [*DOWNSTREAM, *TRAINED],
    "pipeline/recipes/_label_files.py": [*GIVEN, *TRAINED],
    "pipeline/recipes/_other_sets.py": [*GIVEN, *TRAINED],
    "docs/evaluation.md": GIVEN,
    **{f"pipeline/recipes/{name}.py": [name] for name in ALL if name != "demo_table"},
}


def texts(path: Path) -> list[tuple[str, bool]]:
    """A document, or every string of a module, and whether it is prose; what an f-string fills in is NAME."""
    if path.suffix == ".md":
        return [(path.read_text(), True)]
    parts = {ast.FormattedValue: lambda _: "NAME", ast.Constant: lambda node: str(node.value)}
    nodes = list(ast.walk(ast.parse(path.read_text())))
    documents = {node.value for node in nodes if isinstance(node, ast.Expr)}
    return [
        (
            "".join(
                parts[type(part)](part)
                for part in (node.values if isinstance(node, ast.JoinedStr) else [node])
            ),
            node in documents,
        )
        for node in nodes
        if isinstance(node, ast.JoinedStr | ast.Constant)
    ]


def has(config: Config, key: str) -> bool:
    """Whether `--set` finds the key; NAME stands for whatever there is."""
    found = [config.model_dump(mode="json")]
    for part in key.split("."):
        inner = [each for each in found if isinstance(each, dict)]
        found = [value for each in inner for name, value in each.items() if part in (name, "NAME")]
    return bool(found)


def proposed(path: Path, reached: list[str]) -> Iterator[tuple[str, bool]]:
    """Every key that a file's texts propose, and whether the recipes have it: all that reach it; of prose, one."""
    for text, prose in texts(path):
        for line in text.replace("\\\n", "").splitlines():
            for key, stage in PLAIN.findall(line):
                yield key, has(STAGES[stage], key)
            named = EXAMPLE.match(line)  # an example names the recipe that it is of
            of = reached
            if named:
                of = [named[1]] if named[1] else DOWNSTREAM if named[2] == "finetune" else ["evaluate"]
            for key in SETTING.findall(PLAIN.sub("", line)):
                if path.name == "__main__.py":
                    yield key, has(STAGES[path.parent.name], key)
                else:
                    having = [has(recipes.load(name).Recipe(), key) for name in of]
                    yield key, bool(having) and (any if prose and not named else all)(having)


def files(place: str) -> list[Path]:
    path = REPOSITORY / place
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("place", PLACES)
def test_every_setting_that_a_text_proposes_is_one(place: str) -> None:
    found = [(file, *each) for file in files(place) for each in proposed(file, PLACES[place])]
    assert found, f"{place} proposes nothing any more"
    for file, key, known in found:
        assert known, f"{file}: {key}"


def test_no_place_that_proposes_settings_is_left_out() -> None:
    covered = {file for place in PLACES for file in files(place)}
    for room in ("pipeline", "stages", "cluster"):
        for file in (f for f in sorted((REPOSITORY / room).rglob("*.py")) if f not in covered):
            assert not any(SETTING.search(text) for text, _ in texts(file)), f"{file} is in no place"


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
