"""The base of every config: keyword-only, frozen, refuses unknown keys with the nearest valid name.

Fields declared with `not_identity(...)` say where or how fast something runs (paths, workers, caches);
they are left out of `identity`, and so out of every fingerprint.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Set
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import ConfigError


class Config(BaseModel):
    """A frozen config; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @classmethod
    def parse(cls, data: dict[str, Any]) -> Self:
        """Validate `data`; raises ConfigError that lists every wrong key and, for unknown ones, the nearest name."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(_explain(cls, error), remedy="correct the values listed") from None

    @classmethod
    def from_values(cls, data: dict[str, Any], overrides: dict[str, str]) -> Self:
        """The class's defaults, with `data` (nested) merged in, then the dotted `overrides` as in `with_set`."""
        merged = _merge(_defaults(cls), data)
        for key, text in overrides.items():
            _assign(merged, key, text, required={n for n, f in cls.model_fields.items() if f.is_required()})
        return cls.parse(merged)

    def identity(self) -> dict[str, Any]:
        """The JSON-ready fields that decide what the output is."""
        return _identity(self)

    def with_set(self, overrides: dict[str, str]) -> Self:
        """A copy with dotted keys replaced; values are read as JSON, else taken as text.

        Raises ConfigError for an unknown key (naming the nearest valid one) or a value that does not fit.
        """
        data = self.model_dump(mode="json")
        for key, text in overrides.items():
            _assign(data, key, text)
        return type(self).parse(data)


def not_identity(default: Any = ..., **kwargs: Any) -> Any:
    """A field that is no part of the config's identity: paths, worker counts, intervals of progress."""
    return Field(default, json_schema_extra={"identity": False}, **kwargs)


def nearest(name: str, valid: list[str]) -> str:
    """A phrase that proposes the valid name closest to `name`, else lists them all."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else "valid names: " + ", ".join(sorted(valid))


def parse_assignments(pairs: list[str], *, flag: str = "--set") -> dict[str, str]:
    """`["a.b=c"]` → `{"a.b": "c"}`; raises ConfigError, naming the flag, for a pair without `=`."""
    result = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise ConfigError(f"{flag} {pair!r} has no value", expected="KEY=VALUE", found=pair)
        result[key] = value
    return result


def _identity(value: Any) -> Any:
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        kept = {}
        for name, field in fields.items():
            extra = field.json_schema_extra
            if not (isinstance(extra, dict) and extra.get("identity") is False):
                kept[name] = _identity(getattr(value, name))
        return kept
    if isinstance(value, dict):
        return {str(key): _identity(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_identity(item) for item in value]
    return value


def _defaults(cls: type[BaseModel]) -> dict[str, Any]:
    values = {}
    for name, field in cls.model_fields.items():
        if not field.is_required():
            value = field.get_default(call_default_factory=True)
            values[name] = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return values


def _merge(base: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in data.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _assign(data: dict[str, Any], key: str, text: str, required: Set[str] = frozenset()) -> None:
    """Set a dotted key that is there; below a `required` field without default, `parse` judges it instead."""
    *parents, last = key.split(".")
    if key.split(".")[0] in required:
        nested: Any = _value(text)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        data |= _merge(data, nested)
        return
    node: Any = data
    for depth, part in enumerate([*parents, last]):
        if not isinstance(node, dict) or part not in node:
            where = ".".join(key.split(".")[:depth]) or "the config"
            valid = [*node, *(required if depth == 0 else ())] if isinstance(node, dict) else []
            raise ConfigError(
                f"unknown key '{key}': {where} has no '{part}'",
                found=part,
                remedy=nearest(part, valid) if valid else f"{where} is a single value",
            )
        if depth < len(parents):
            node = node[part]
    node[last] = _value(text)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _explain(cls: type[BaseModel], error: ValidationError) -> str:
    lines = [f"{cls.__name__} is not valid:"]
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        text = item["msg"]
        if item["type"] == "extra_forbidden":
            text = "unknown key, " + nearest(str(item["loc"][-1]), _fields_at(cls, item["loc"][:-1]))
        lines.append(
            f"  {where}: {text}" + ("" if isinstance(item["input"], dict) else f" (found {item['input']!r})")
        )
    return "\n".join(lines)


def _fields_at(cls: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Names of the fields at a location of an error: below fields, items of lists, members of a tagged union."""
    models = [cls]
    for part in path:
        inner = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        if inner:
            models = [model for annotation in inner for model in _models(annotation)]
        elif not isinstance(part, int):  # the tag that chose a member of a union
            models = [m for m in models if any(f.default == part for f in m.model_fields.values())]
    return sorted({name for model in models for name in model.model_fields})


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]
