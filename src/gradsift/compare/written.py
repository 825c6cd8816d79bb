"""How a comparison is written: spans of seeds, presets, overrides, and what differs between two of them (ours)."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from importlib.resources import as_file, files
from typing import Any

from gradsift.errors import ConfigError
from gradsift.manifest import canonical_json
from gradsift.recipe import load_recipe

MAX_SEEDS = 10_000
_SPAN = re.compile(r"^(\d+)(?:-(\d+))?$")


def parse_seeds(value: Any) -> Any:
    """Read ``0-9``, ``0-4,10,12-13``, a number or a list of numbers.

    Args:
        value: what a recipe or a flag holds.

    Returns:
        Seeds in rising order; anything else is handed back for the caller to refuse.

    Raises:
        ValueError: a text that is no list of spans, a span that falls, more than MAX_SEEDS, or a seed named twice.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    if not isinstance(value, str):
        return value
    seeds: list[int] = []
    for part in value.split(","):
        found = _SPAN.match(part.strip())
        if not found:
            raise ValueError(f"seeds are written 0-9 or 0,1,5, not {part.strip()!r}")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first or last - first >= MAX_SEEDS:
            raise ValueError(f"the span {part.strip()} falls or holds more than {MAX_SEEDS} seeds")
        seeds += range(first, last + 1)
    return tuple(seeds)


def write_seeds(seeds: Iterable[int]) -> str:
    """Write seeds the way ``parse_seeds`` reads them.

    Args:
        seeds: seeds in rising order.

    Returns:
        For example ``0-4,10``.
    """
    spans: list[list[int]] = []
    for seed in seeds:
        if spans and seed == spans[-1][1] + 1:
            spans[-1][1] = seed
        else:
            spans.append([seed, seed])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def presets() -> tuple[str, ...]:
    """List the presets.

    Returns:
        Names, sorted.
    """
    found = (item.name for item in files("gradsift.compare").joinpath("presets").iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml")))


def changed_field(old: Any, new: Any, path: str = "") -> str | None:
    """Find the first field in which two nested mappings differ.

    Args:
        old: plain values.
        new: plain values.
        path: dotted name of the place, empty at the top.

    Returns:
        ``field: old, now new``, or None when they are equal. Lists of named items are matched by name.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            found = changed_field(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
            if found:
                return found
        return None
    if _named(old) and _named(new) and [i["name"] for i in old] == [i["name"] for i in new]:
        pairs = ((a, b, f"{path}.{a['name']}") for a, b in zip(old, new, strict=True))
        return next((found for a, b, at in pairs if (found := changed_field(a, b, at))), None)
    if canonical_json(old) == canonical_json(new):
        return None
    if _named(old) and _named(new):
        old, new = ([i["name"] for i in some] for some in (old, new))
    return f"{path}: declared {_short(old)}, now {_short(new)}"


def _named(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(i, Mapping) and "name" in i for i in value)


def _short(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(i, int) for i in value):
        return write_seeds(value)
    text = canonical_json(value)
    return text if len(text) <= 160 else text[:157] + "..."


def load_preset(name: str) -> dict[str, Any]:
    """Read a preset.

    Args:
        name: one of ``presets()``.

    Returns:
        Its nested fields.

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in presets():
        raise ConfigError("there is no such preset", where="--preset", got=name, expected=", ".join(presets()))
    with as_file(files("gradsift.compare").joinpath("presets", f"{name}.yaml")) as path:
        return load_recipe(path)


def with_overrides(values: Mapping[str, Any], overrides: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Put ``--set`` overrides into nested fields.

    Args:
        values: nested fields; not changed.
        overrides: dotted keys and values; ``arms.NAME.field`` reaches into the arm of that name.

    Returns:
        New nested fields.

    Raises:
        ConfigError: a key goes through a field that has no parts, or names an arm that is not there.
    """
    result = copy.deepcopy(dict(values))
    for key, value in overrides:
        *parents, last = key.split(".")
        node: Any = result
        for part in parents:
            if isinstance(node, list):
                node = next((item for item in node if isinstance(item, dict) and item.get("name") == part), None)
            elif isinstance(node, dict):
                if node.get(part) is None:
                    node[part] = {}
                node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(
                "this field has no such part", where=f"--set {key}", got=key, do="see manifest.json of a run"
            )
        node[last] = value
    return result
