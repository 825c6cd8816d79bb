"""The registered step hooks of online gradient surgery, and how one is made from a name and settings.

They choose no data: they are comparators for methods that do, at counted cost. Reference passes are in ``.cost``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from gradsift.errors import ConfigError
from gradsift.train.conflict_replay import ConflictReplayHook, ConflictReplaySettings, fix_replay
from gradsift.train.hook_base import HookSettings, SurgeryHook
from gradsift.train.hook_reference import BaseKL, fix_sources
from gradsift.train.hook_rules import (
    AgemHook,
    AgemSettings,
    GemHook,
    GemSettings,
    OgpsaHook,
    OgpsaSettings,
    PcgradHook,
    PcgradSettings,
    SafegradHook,
    SafegradSettings,
)
from gradsift.train.hook_subspace import GpmHook, GpmSettings, OgdHook, OgdSettings
from gradsift.types import TokenRow

_REGISTRY: dict[str, tuple[type[HookSettings], type[SurgeryHook]]] = {
    "agem": (AgemSettings, AgemHook),
    "conflict_replay": (ConflictReplaySettings, ConflictReplayHook),
    "gem": (GemSettings, GemHook),
    "gpm": (GpmSettings, GpmHook),
    "ogd": (OgdSettings, OgdHook),
    "ogpsa": (OgpsaSettings, OgpsaHook),
    "pcgrad": (PcgradSettings, PcgradHook),
    "safegrad": (SafegradSettings, SafegradHook),
}


def step_hooks() -> tuple[str, ...]:
    """List the registered step hooks.

    Returns:
        Names, sorted.
    """
    return tuple(sorted(_REGISTRY))


def make_hook(
    name: str,
    settings: Mapping[str, Any],
    *,
    model: nn.Module,
    sources: Mapping[str, Sequence[TokenRow]],
    pad_id: int,
    seed: int,
    forbidden_ids: Collection[str] = (),
    replay: Sequence[TokenRow] = (),
) -> SurgeryHook:
    """Build a step hook.

    Args:
        name: registered name.
        settings: the hook's own fields.
        model: the model before training, with its original weights; ``safegrad`` copies it unless it has an adapter.
        sources: reference rows of what must not be lost, by source name.
        pad_id: padding token.
        seed: of the draws of reference rows and of PCGrad's orders.
        forbidden_ids: ids of the rows that evaluation uses; a reference row among them is refused.
        replay: general rows that ``conflict_replay`` mixes in; the others do not read them.

    Returns:
        The hook.

    Raises:
        ConfigError: the name or a setting is unknown or has a wrong value, or there is no source.
        DataError: a source has unusable rows or rows of the evaluation set, or replay rows are measured with.
    """
    if name not in _REGISTRY:
        raise ConfigError("there is no such step hook", where="hook", got=name, expected=", ".join(step_hooks()))
    chosen = _settings(name, settings)
    fixed = fix_sources(
        sources,
        num_pool=chosen.num_pool,
        forbidden_ids=frozenset(forbidden_ids),
        num_reference=chosen.num_reference,
        tokens_per_batch=chosen.tokens_per_batch,
        pad_id=pad_id,
        seed=seed,
    )
    if isinstance(chosen, SafegradSettings):
        adapter = hasattr(model, "disable_adapter")
        return SafegradHook(name, chosen, fixed, BaseKL(None if adapter else _frozen(model)))
    if isinstance(chosen, ConflictReplaySettings):
        general = fix_replay(replay, chosen, sources=sources, forbidden_ids=forbidden_ids, pad_id=pad_id, seed=seed)
        return ConflictReplayHook(name, chosen, fixed, general)
    # A rule that constrains every tensor is another method, and must not be reported under the name of the first.
    shown = f"{name}_per_tensor" if getattr(chosen, "granularity", "model") == "tensor" else name
    return _REGISTRY[name][1](shown, chosen, fixed)


def _settings(name: str, settings: Mapping[str, Any]) -> HookSettings:
    cls = _REGISTRY[name][0]
    fields = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(settings) - fields)
    if unknown:
        raise ConfigError(
            f"the step hook {name} has no such setting",
            where="hook settings",
            got=", ".join(unknown),
            expected=", ".join(sorted(fields)),
        )
    try:
        return TypeAdapter(cls).validate_python(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"a setting of the step hook {name} has a wrong value",
            where=".".join(map(str, first["loc"])),
            got=repr(first["input"]),
            expected=first["msg"],
        ) from None


def _frozen(model: nn.Module) -> nn.Module:
    gradients = [p.grad for p in model.parameters()]
    for parameter in model.parameters():  # a copy of the gradients would only cost memory
        parameter.grad = None
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    for parameter, grad in zip(model.parameters(), gradients, strict=True):
        parameter.grad = grad
    return frozen
