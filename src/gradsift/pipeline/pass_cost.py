"""Multiplications of a pass beside those of the whole one: fewer layers, held prompts, two stages (ours; arithmetic, not measured)."""

from __future__ import annotations

from dataclasses import dataclass

from gradsift.errors import ConfigError
from gradsift.gradients.upper import first_layer
from gradsift.pipeline.early import layer_count
from gradsift.pipeline.measure import measured_rows
from gradsift.pipeline.prepare import Prepared
from gradsift.recipe import CollectConfig, ScreenConfig

FORWARD, BACKWARD = 2.0, 4.5  # per weight and token; the backward with the dots and sketches of every weight
BACKWARD_LORA = 2.0  # the base has no gradients of its own
FEW = 20  # rows that a pool must have beyond those that are measured anyway


@dataclass(frozen=True)
class ScreenPlan:
    """What two stages take of one pass over everything.

    Args:
        by: what the first stage measures, in words.
        num_drawn: rows that are measured exactly whatever the first stage says.
        least: cost if no other row may be chosen, as a share of the pass over everything; at least 0.
        most: cost if every row may be chosen.
    """

    by: str
    num_drawn: int
    least: float
    most: float

    def words(self) -> str:
        """Say it.

        Returns:
            A phrase for a dry run.
        """
        return (
            f"every row by {self.by} first; then {self.num_drawn:,} drawn rows and those that may be chosen exactly, whose number "
            f"only the first stage tells: {self.least:.2f} to {self.most:.2f} of a pass over everything"
        )


def pass_work(prepared: Prepared, collect: CollectConfig) -> float:
    """Give the multiplications and additions of a gradient pass per weight and token of the pool.

    Args:
        prepared: the run's inputs.
        collect: which layers and positions.

    Returns:
        Operations per weight and token, above 2.

    Raises:
        ConfigError: the model has no such number of layers.
    """
    back = BACKWARD_LORA if prepared.recipe.navigator.parameters == "lora" else BACKWARD
    if collect.layers is not None:
        count = layer_count(prepared.resolved.folder)
        if count is not None:
            back *= (count - first_layer(collect.layers, count)) / count
    if collect.positions == "trained":
        rows = measured_rows(prepared)
        back *= sum(row.num_trained for row in rows) / max(sum(row.num_tokens for row in rows), 1)
    return FORWARD + back


def plan_screen(prepared: Prepared) -> ScreenPlan | None:
    """Work out what the two stages of a screen take.

    Args:
        prepared: the run's inputs.

    Returns:
        The plan, or None where no screen was asked for.

    Raises:
        ConfigError: the pool is too small for a screen, or the model has no such number of layers.
    """
    config = prepared.recipe.screen
    if config.by is None:
        return None
    rows = measured_rows(prepared)
    refuse_small(len(rows), config)
    drawn = config.calibrate + config.certify
    first = pass_work(prepared, cheap_collect(prepared, config.by)) / pass_work(prepared, prepared.recipe.collect)
    by = "its trained positions" if config.by == "trained" else f"its upper layers ({config.by})"
    return ScreenPlan(by, drawn, first + drawn / len(rows), first + 1)


def cheap_collect(prepared: Prepared, by: str) -> CollectConfig:
    """Give the settings of the first stage.

    Args:
        prepared: the run's inputs.
        by: ``screen.by``.

    Returns:
        The run's own settings but for layers or positions, and signals.
    """
    part = {"positions": "trained"} if by == "trained" else {"layers": by}
    return prepared.recipe.collect.model_copy(update={**part, "signals": "auto"})


def refuse_small(num_rows: int, config: ScreenConfig) -> None:
    """Refuse a pool of which a screen would leave nothing out.

    Args:
        num_rows: eligible rows.
        config: the screen's settings.

    Raises:
        ConfigError: there are fewer than the drawn ones and some more.
    """
    least = config.calibrate + config.certify + FEW
    if num_rows < least:
        raise ConfigError(
            "the pool is too small for a screen",
            where="--screen, screen.calibrate and screen.certify",
            got=f"{num_rows} eligible rows",
            expected=f"at least {least}: {config.calibrate} to calibrate, {config.certify} to certify, and some to leave out",
            do="leave --screen out: measuring every row costs no more",
        )
