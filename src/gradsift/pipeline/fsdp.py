"""One navigator held by all ranks of torchrun together: what such a run is refused for, and how it is loaded (ours)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from gradsift.errors import ConfigError
from gradsift.gradients.taps import find_layers
from gradsift.launch.lockstep import Lockstep
from gradsift.launch.seat import Seat
from gradsift.methods import Method
from gradsift.models.load import Navigator
from gradsift.models.shard import Sharded, shard_model
from gradsift.recipe import AUTO, Recipe

Entered = TypeVar("Entered", bound=tuple[Any, ...])


def check_fsdp(recipe: Recipe, method: Method, seat: Seat | None) -> None:
    """Refuse what the ranks cannot do with a navigator that each of them holds a part of, before anything is read.

    Args:
        recipe: the run's settings.
        method: the rule that will choose.
        seat: this process, or None.

    Raises:
        ConfigError: the navigator would be trained, its micro-batches would not be alike in all ranks, or their size is to
            follow a rank's free memory.
    """
    if seat is None or not seat.fsdp:
        return
    needs, lora = method.needs, recipe.navigator.lora
    trained = {
        "a warm-up": needs.warmup is not None and bool(needs.warmup.epochs),
        "probes": needs.probes is not None,
        "roll-outs": bool(needs.rollouts),
        "a training in rounds": bool(needs.proxy),
    }
    for what in (name for name, on in trained.items() if on):
        raise _refused(
            f"{method.name} trains the navigator ({what})",
            "--fsdp and --method",
            method.name,
            "a method that measures only",
        )
    if recipe.navigator.parameters == "lora" and lora.warmup_share > 0:
        raise _refused("the adapter would be trained", "navigator.lora.warmup_share", lora.warmup_share, "0")
    if recipe.collect.positions != "all":
        raise _refused(
            "prompts are held constant by calls of their own", "collect.positions", recipe.collect.positions, "all"
        )
    if recipe.active_anchors is not None:
        raise _refused(
            "anchors' rows are measured apart", "active_anchors", recipe.active_anchors, "all rows of an anchor"
        )
    if recipe.collect.tokens_per_batch == AUTO:
        raise _refused(
            "the free memory of one rank does not say what fits all", "collect.tokens_per_batch", "auto", "a number"
        )


def _refused(what: str, where: str, got: object, expected: str) -> ConfigError:
    return ConfigError(
        f"{what}, which the ranks that hold it together cannot do", where=where, got=got, expected=expected,
        do="change this, or leave --fsdp out",
    )  # fmt: skip


def load_shared(
    lockstep: Lockstep, load: Callable[[str], Navigator], enter: Callable[[Navigator], Entered]
) -> tuple[Navigator, Entered]:
    """Load the navigator into main memory, one rank of a machine after the other, and deal its weights out.

    Args:
        lockstep: the ranks.
        load: device -> the navigator there.
        enter: puts the adapter on and looks at the model while it is whole; the model comes first.

    Returns:
        The navigator and what ``enter`` gave.
    """
    kept: list[tuple[Navigator, Entered]] = []

    def deal() -> Sharded:
        navigator = load("cpu")
        entered = enter(navigator)
        sharded = shard_model(entered[0], find_layers(entered[0]), lockstep.mesh)
        kept.append((dataclasses.replace(navigator, device=lockstep.device), entered))
        return sharded

    lockstep.in_turn(deal)
    return kept[0]
