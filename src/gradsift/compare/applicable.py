"""Whether a world's data can feed a method: where they cannot, the arm is a row with the reason and no cell (ours)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from gradsift.errors import ConfigError
from gradsift.methods.base import Method, make_method, methods

if TYPE_CHECKING:
    from gradsift.compare.analysis import Missing
    from gradsift.compare.arms import ArmSpec
    from gradsift.compare.world import World

NOT_APPLICABLE = "not applicable: "


class NotApplicable(ConfigError):
    """An arm whose method needs what the world does not have."""


def _domains(world: World, method: Method) -> str | None:
    labels = {world.sources.get(row.id, "pool") for row in world.pool}
    return "domains" if method.needs.domains and len(labels) < 2 else None


def _anchors(world: World, method: Method) -> str | None:
    return "anchors" if method.needs.anchors and not world.anchors else None


def _target(world: World, method: Method) -> str | None:
    return "target" if method.needs.target and not world.target else None


def _columns(world: World, method: Method) -> str | None:
    needed = [column.name for column in method.needs.columns if not column.optional]
    return f"column {needed[0]}" if needed else None  # no world brings scores that somebody else made


def _prompts(world: World, method: Method) -> str | None:
    if not method.needs.texts and not method.needs.signals & {"prompt_loss", "alone_loss"}:
        return None
    return None if any(row.num_tokens - row.num_trained > 1 for row in world.pool) else "prompts"


def _layers(world: World, method: Method) -> str | None:
    if not method.needs.layers:
        return None
    config: Any = world.make_model().config
    beyond = [n for n in method.needs.layers if n > config.num_hidden_layers]
    return f"layer {beyond[0]}" if beyond else None


# One function per need: the world and the method in, the need's name out where the world cannot feed it.
CHECKS: tuple[Callable[[World, Method], str | None], ...] = (_domains, _anchors, _target, _columns, _prompts, _layers)


def missing(world: World, method: Method) -> str | None:
    """Name the first need of a method that a world cannot feed.

    Args:
        world: rows, labels, anchors and target.
        method: with its settings, on which its needs may depend.

    Returns:
        The need, such as ``domains``, or None where the method can run.
    """
    return next((need for check in CHECKS if (need := check(world, method)) is not None), None)


def refuse_inapplicable(world: World, arm: ArmSpec) -> None:
    """Refuse an arm that its world cannot feed; arms that are no registered method pass.

    Args:
        world: of the cell.
        arm: the arm.

    Raises:
        NotApplicable: its text begins with ``not applicable:`` and names the need.
    """
    kind = methods().get(arm.method)
    if kind is None:
        return
    own = {field.name for field in fields(kind)}  # an arm may have settings of its own beside the method's
    need = missing(world, make_method(arm.method, {k: v for k, v in arm.settings.items() if k in own}))
    if need is not None:
        raise NotApplicable(f"{NOT_APPLICABLE}{need}", where=f"{arm.name} in the {world.name} world")


def reason(text: str) -> str | None:
    """Cut the reason out of the record of a cell that was not run.

    Args:
        text: why it was not run.

    Returns:
        ``not applicable: <need>``, or None where the cell failed or was not started.
    """
    first = text.partition("\n")[0]
    return first if first.startswith(NOT_APPLICABLE) else None


def inapplicable_rows(gone: tuple[Missing, ...]) -> dict[str, str]:
    """List the arms that the world cannot feed.

    Args:
        gone: cells without a result.

    Returns:
        Arm -> ``not applicable: <need>``, in the order they come.
    """
    return {cell.arm: why for cell in gone if (why := reason(cell.why)) is not None}
