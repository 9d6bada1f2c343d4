"""YAML recipes: `base:` files, `key.path=value` overrides, and every mistake in one message."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pixart_ds.config.schema import ChainConfig, PrepareConfig, Section, StageConfig
from pixart_ds.errors import ConfigError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"

ConfigT = TypeVar("ConfigT", bound=Section)

_ALTERNATIVES = {
    "steps": "images",
    "images": "steps",
    "stage": "path",
    "path": "stage",
    "square": "sizes",
    "sizes": "square",
    "every": "mean_time_between_failures_hours",
    "mean_time_between_failures_hours": "every",
}
"""Keys of which a section takes only one: naming one drops the other of the layer below."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads 1e-4 as a number (YAML 1.1 takes it for text)."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return typing.cast("dict[Any, Any]", yaml.SafeLoader.construct_mapping(loader, node, deep=True))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: object) -> Any:
    """The value of a YAML text; duplicate keys are errors.

    Raises:
        ConfigError: The text is not YAML; the message has line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as cause:
        mark = getattr(cause, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(where)
        raise ConfigError(str(getattr(cause, "problem", cause)), where=place, remedy="mend the YAML there") from cause


def read_layers(path: Path, _chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping of a recipe file laid over its `base:`: a path relative to the file, or a list, later ones on top."""
    path = path.resolve()
    if path in _chain:
        raise ConfigError("base: goes in a circle: " + " → ".join(p.name for p in (*_chain, path)), where=path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as cause:
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("**/*.yaml")))
        raise ConfigError(
            f"there is no recipe file {path.name}",
            where=path,
            remedy=f"give a path, or one of the recipes of the package: {known}",
        ) from cause
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"the recipe cannot be read: {cause}", where=path) from cause
    values = parse_yaml(text, path)
    if not isinstance(values, dict):
        raise ConfigError(f"a recipe is a mapping of keys, not {type(values).__name__}", where=path)
    bases = values.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"base: is a path or a list of paths, not {bases!r}", where=path)
    result: dict[str, Any] = {}
    for base in bases:
        result = merge(result, read_layers(path.parent / base, (*_chain, path)))
    return merge(result, values)


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `under`, key by key through nested mappings; lists and values are replaced whole.

    A key that is one of two alternatives (steps / images) takes the other one's place.
    """
    result = copy.deepcopy(dict(under))
    for key in over:
        result.pop(_ALTERNATIVES.get(key, ""), None)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merge(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Applies `key.path=value` texts; the value is read as YAML. An index addresses a list: `data.sets.0.path=…`."""
    values = copy.deepcopy(values)
    for text in overrides:
        path, equals, raw = text.partition("=")
        if not equals or not path:
            raise ConfigError(
                f"the override {text!r} is not key.path=value", remedy="write for example length.steps=100"
            )
        *parents, last = path.split(".")
        holder = _descend(values, parents, text)
        if isinstance(holder, dict):
            holder.pop(_ALTERNATIVES.get(last, ""), None)
        value = parse_yaml(raw, f"override {text!r}")
        if isinstance(holder, list):
            if not last.isdigit() or int(last) >= len(holder):
                raise ConfigError(f"{path} is not an element of a list of {len(holder)}", where=f"override {text!r}")
            holder[int(last)] = value
        else:
            holder[last] = value
    return values


def _descend(values: Any, parents: Sequence[str], text: str) -> Any:
    for depth, key in enumerate(parents):
        if isinstance(values, list) and key.isdigit() and int(key) < len(values):
            values = values[int(key)]
        elif isinstance(values, dict):
            values = values.setdefault(key, {})
        else:
            raise ConfigError(
                f"{'.'.join(parents[: depth + 1])} leads into a value, not into a section", where=f"override {text!r}"
            )
    if not isinstance(values, dict | list):
        raise ConfigError(f"{'.'.join(parents)} is a value, not a section", where=f"override {text!r}")
    return values


def validate(kind: type[ConfigT], values: Mapping[str, Any], where: object, names: Sequence[str] = ()) -> ConfigT:
    """The frozen config; all mistakes come in one ConfigError, each with key, value and remedy.

    `names` are those of a chain's stages, in whose place a message would otherwise say `stages.0`.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as cause:
        lines = _lines(kind, cause.errors())
        for number, name in enumerate(names):
            lines = [re.sub(rf"^stages\.{number}\b", name, line) for line in lines]
        count = f"{len(lines)} mistake" + ("s" if len(lines) > 1 else "")
        raise ConfigError(
            f"{count} in the recipe:\n" + "\n".join(f"  - {line}" for line in lines), where=where
        ) from cause


def _lines(kind: type[BaseModel], problems: Sequence[Any]) -> list[str]:
    """One line for each wrong key."""
    # a list whose element is wrong also reports itself as too short: only the element is worth saying
    places = [problem["loc"] for problem in problems]
    problems = [
        p for p in problems if not any(len(q) > len(p["loc"]) and q[: len(p["loc"])] == p["loc"] for q in places)
    ]
    # the alternatives of a union report apart, with a tag for each in the path: one key, one line
    said: dict[str, list[str]] = {}
    for problem in problems:
        path = tuple(part for part in problem["loc"] if isinstance(part, int) or re.fullmatch(r"\w+", part))
        key = ".".join(str(part) for part in path) or "the whole"
        message = _explain(kind, path, problem)
        if message not in said.setdefault(key, []):
            said[key].append(message)
    return [f"{key}: {', or '.join(messages)}" for key, messages in said.items()]


def _explain(kind: type[BaseModel], path: Sequence[Any], problem: Any) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = _keys_at(kind, path[:-1])
        close = difflib.get_close_matches(str(path[-1]), known, n=1)
        advice = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        return f"there is no such key (value {_short(problem['input'])}); {advice}"
    if problem["type"] == "missing":
        return "this key is missing; add it"
    if problem["type"] == "value_error":
        return str(message)
    return f"{message[0].lower()}{message[1:]}, not {_short(problem['input'])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _keys_at(kind: Any, path: Sequence[Any]) -> list[str]:
    """Known keys of the section at `path`, looked up through nested models, unions and tuples."""
    for part in path:
        model = _model_in(kind)
        if isinstance(part, int):
            continue  # an element of a tuple: the model is already in hand
        if model is None or part not in model.model_fields:
            return []
        kind = model.model_fields[part].annotation
    model = _model_in(kind)
    return list(model.model_fields) if model else []


def _model_in(kind: Any) -> type[BaseModel] | None:
    if isinstance(kind, type) and not isinstance(kind, types.GenericAlias) and issubclass(kind, BaseModel):
        return kind
    for inner in typing.get_args(kind):
        if (found := _model_in(inner)) is not None:
            return found
    return None


def find_recipe(name: str) -> Path:
    """A path as given, or the package's recipe of that name (`stage2`, `demo/stage2`)."""
    given = Path(name)
    if given.suffix in (".yaml", ".yml") or given.exists():
        return given
    return RECIPES / f"{name}.yaml"


def load_stage(recipe: str, overrides: Sequence[str] = ()) -> StageConfig:
    """A stage's recipe by path or name, with overrides, validated."""
    path = find_recipe(recipe)
    return validate(StageConfig, apply_overrides(read_layers(path), overrides), path)


def load_prepare(recipe: str, overrides: Sequence[str] = ()) -> PrepareConfig:
    """A prepare recipe by path or name, with overrides, validated."""
    path = find_recipe(recipe)
    return validate(PrepareConfig, apply_overrides(read_layers(path), overrides), path)


def load_chain(recipe: str, overrides: Sequence[str] = ()) -> ChainConfig:
    """A chain's recipe: `name` and `stages`, a list of recipe paths relative to it.

    An override `stage2.length.steps=10` goes to that stage; `*.seed=1` goes to all; `budget.usd=900` to the chain's budget.
    """
    path = find_recipe(recipe)
    values = read_layers(path)
    names = values.get("stages")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"stages: is a list of recipe paths, not {_short(names)}", where=path)
    layers = [read_layers(path.parent / name) for name in names]
    stages = {str(layer.get("name")): layer for layer in layers}
    for text in overrides:
        target, dot, rest = text.partition(".")
        if target == "budget" and dot and target not in stages:
            values = apply_overrides({**values, "budget": values.get("budget") or {}}, [text])
            continue
        wanted = list(stages) if target == "*" else [target]
        if not dot or any(name not in stages for name in wanted):
            raise ConfigError(
                f"the override {text!r} names no stage of the chain",
                where=path,
                remedy=f"begin with one of: {', '.join(stages)}, *, budget",
            )
        for name in wanted:
            stages[name] = apply_overrides(stages[name], [rest])
    return validate(ChainConfig, {**values, "stages": list(stages.values())}, path, names=list(stages))


def dump_yaml(config: Section) -> str:
    """The resolved config as YAML that `load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_frozen(kind: type[ConfigT], path: Path) -> ConfigT:
    """A resolved config that was frozen into a run."""
    return validate(kind, read_layers(path), path)


IDENTITY_EXCLUDES: dict[str, Any] = {
    **dict.fromkeys(("execution", "guard", "previews", "description", "paper_gpus", "paper_gpu_days"), True),
    "checkpoint": {"every", "mean_time_between_failures_hours", "keep", "milestone_every"},
}
"""Keys of a stage that may differ on resume: they follow from the world or the device, or change no weight."""


def identity(stage: StageConfig) -> dict[str, Any]:
    """What makes two runs of a stage the same run."""
    return stage.model_dump(mode="json", exclude=IDENTITY_EXCLUDES)


def fingerprint(value: Any) -> str:
    """A short hash of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old → new` for every leaf in which two nested mappings differ."""
    lines: list[str] = []
    for key in [*before, *(k for k in after if k not in before)]:
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {_short(old)} → {_short(new)}")
    return lines
