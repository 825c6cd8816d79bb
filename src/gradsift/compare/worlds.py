"""The worlds by name: how one seed of each is built, and what a comparison fixes about it before it starts (ours)."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from importlib import import_module
from typing import Any

from gradsift.compare.cell import Grid
from gradsift.compare.config import CompareConfig, GridConfig, WorldConfig, build_config
from gradsift.compare.placebo import exchangeable
from gradsift.compare.world import World
from gradsift.errors import ConfigError
from gradsift.evaluate.pareto import ACCURACY_REFERENCE, LOSS_REFERENCE

# name -> module, function (seed, settings) -> World, and the module's own grid
_WORLDS = {
    "arithmetic": ("gradsift.compare.arithmetic", "arithmetic_world", ""),
    "text": ("gradsift.compare.text_world", "text_world", "TEXT_GRID"),
    "real": ("gradsift.compare.real_world", "real_world", "REAL_GRID"),
    "junk": ("gradsift.compare.junk_world", "junk_world", "REAL_GRID"),
}
_REAL = ("real", "junk")  # a real model, whose frozen weights all models of a seed share


def _builder(name: str) -> tuple[Callable[..., World], type[Any]]:
    module, function, _ = _WORLDS[name]
    build = getattr(import_module(module), function)
    hint = typing.get_type_hints(build)["settings"]
    kinds = [k for k in (typing.get_args(hint) or (hint,)) if k is not type(None)]
    return build, kinds[0]


def world_settings(config: WorldConfig) -> Any:
    """Fill a world's settings.

    Args:
        config: its name and what differs from the defaults.

    Returns:
        The settings dataclass of that world.

    Raises:
        ConfigError: a field is unknown or has another type than the default.
    """
    _, kind = _builder(config.name)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(config.settings) - set(fields)):
        raise ConfigError("the world has no such setting", where="world.settings", got=", ".join(unknown),
                          expected=", ".join(fields))  # fmt: skip
    plain = kind()
    given = {}
    for name, value in config.settings.items():
        default = getattr(plain, name)
        value = tuple(value) if isinstance(value, list) else value
        fits = type(value) is type(default) or (type(default) is float and type(value) is int)
        if default is not None and not fits:
            raise ConfigError("a setting of the world has the wrong type", where=f"world.settings.{name}", got=repr(value),
                              expected=type(default).__name__)  # fmt: skip
        given[name] = float(value) if isinstance(default, float) and isinstance(value, int) else value
    return dataclasses.replace(plain, **given)


def world_version(config: WorldConfig) -> int | None:
    """Number a world's rules, where they have changed since cells of it were published; a part of every cell's key.

    Args:
        config: which world.

    Returns:
        2 for the real worlds of the financial domain: a wrong answer is the answer of another row of the pool, and no longer of
        any row, evaluation's included. None where nothing has changed.
    """
    return 2 if config.name in _REAL and world_settings(config).domain == "financial" else None


def place(config: WorldConfig, device: str, turn: int = 0) -> str:
    """Say where a world's models live.

    Args:
        config: which world.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``: planted worlds train models of a few layers, which a processor
            core does faster, so only those with a real model take a GPU unasked.
        turn: which of several processes asks; they share the GPUs evenly.

    Returns:
        ``cpu`` or ``cuda:N``.

    Raises:
        ModelError: there is no such device.
    """
    if device == "auto" and config.name not in _REAL:
        return "cpu"
    import torch

    from gradsift.models.load import resolve_device

    found = resolve_device(device, "--device")
    if found == "cpu" or ":" in device:
        return found
    return f"cuda:{turn % torch.cuda.device_count()}"


def build_world(config: WorldConfig, seed: int, device: str = "cpu") -> World:
    """Build one seed of a world.

    Args:
        config: which.
        seed: of weights, splits and rows.
        device: where its models live, from :func:`place`.

    Returns:
        The world.
    """
    build, _ = _builder(config.name)
    if config.name in _REAL:
        world = build(seed, world_settings(config), device=device)
    else:
        world = build(seed, world_settings(config))
        if device != "cpu":
            make = world.make_model
            world = dataclasses.replace(world, make_model=lambda: make().to(device))
    return exchangeable(world, config.exchangeable) if config.exchangeable else world


def make_grid(config: CompareConfig) -> Grid:
    """Return the grid of a resolved comparison."""
    assert config.grid is not None, "resolve the comparison first"
    return Grid(**config.grid.model_dump())


def resolve(config: CompareConfig) -> CompareConfig:
    """Fill in every default, so that the manifest holds the figures that were used and a changed default is noticed.

    Args:
        config: as a person wrote it.

    Returns:
        The same comparison with all settings of the world, the grid and the reference point.
    """
    values = config.dump()
    values["world"]["settings"] = dataclasses.asdict(world_settings(config.world))
    if config.grid is None:
        module, _, name = _WORLDS[config.world.name]
        values["grid"] = dataclasses.asdict(getattr(import_module(module), name) if name else Grid())
    else:
        values["grid"] = GridConfig(**config.grid.model_dump()).model_dump()
    if config.reference is None:
        values["reference"] = list(ACCURACY_REFERENCE if config.metric == "accuracy" else LOSS_REFERENCE)
    return build_config(values)
