"""Configs refuse what they do not know, and say what is near."""

from __future__ import annotations

import pytest

from cluster.errors import ConfigError
from stages.config import Config, not_identity, parse_assignments


class Inner(Config):
    rate: float = 0.1
    path: str = not_identity("/a")


class Outer(Config):
    inner: Inner = Inner()
    steps: int = 10
    names: tuple[str, ...] = ("x",)


def test_set_replaces_nested_values_read_as_json() -> None:
    config = Outer().with_set({"inner.rate": "0.5", "names": '["a", "b"]', "inner.path": "/b"})
    assert (config.inner.rate, config.names, config.inner.path) == (0.5, ("a", "b"), "/b")


@pytest.mark.parametrize(("key", "near"), [("stepz", "steps"), ("inner.rat", "rate"), ("iner.rate", "inner")])
def test_unknown_key_names_the_nearest(key: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{near}'") as caught:
        Outer().with_set({key: "1"})
    assert caught.value.exit_code == 2


def test_value_of_the_wrong_type_is_named() -> None:
    with pytest.raises(ConfigError, match=r"steps: .*integer.*'many'"):
        Outer().with_set({"steps": "many"})


def test_unknown_key_in_a_file_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"inner\.rte: unknown key, did you mean 'rate'"):
        Outer.parse({"inner": {"rte": 1}})


def test_key_below_a_single_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="steps is a single value"):
        Outer().with_set({"steps.more": "1"})


def test_assignment_without_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_assignments(["steps"])


def test_identity_leaves_paths_out() -> None:
    assert Outer().identity() == {"inner": {"rate": 0.1}, "steps": 10, "names": ["x"]}


class Strict(Config):
    inner: Inner
    path: str
    options: Inner = Inner(rate=0.7)


def test_values_fill_required_fields_and_keep_the_defaults_of_this_class() -> None:
    config = Strict.from_values({"path": "/x"}, {"inner.rate": "2", "options.path": "/c"})
    assert (config.inner.rate, config.options.rate, config.options.path) == (2.0, 0.7, "/c")


@pytest.mark.parametrize(("key", "near"), [("inner.rat", "rate"), ("options.rat", "rate"), ("pth", "path")])
def test_unknown_key_among_required_ones_names_the_nearest(key: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
        Strict.from_values({"path": "/x", "inner": {}}, {key: "1"})


def test_missing_required_value_is_named() -> None:
    with pytest.raises(ConfigError, match="inner: Field required"):
        Strict.from_values({}, {"path": "x"})
