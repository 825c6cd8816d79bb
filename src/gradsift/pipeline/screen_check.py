"""What a two-stage run is refused for, before anything is read."""

from __future__ import annotations

from gradsift.errors import ConfigError
from gradsift.launch.seat import Seat
from gradsift.methods import Method
from gradsift.recipe import Recipe

PREDICTED = frozenset({"grad_norm", "anchor_dot", "target_dot"})  # what the screen predicts
EXACT = frozenset({"loss", "head_grad_norm", "lexical"})  # what it measures exactly, or what needs no model


def check_screen(recipe: Recipe, method: Method) -> None:
    """Refuse a screen before a method whose rows cannot be screened.

    Args:
        recipe: the run's settings.
        method: the rule that will choose.

    Raises:
        ConfigError: the method looks at other signals than a screen predicts, or judges rows by one another; the pool
            keeps copies; or the exact pass is one over upper layers.
    """
    if recipe.screen.layers is None:
        return
    needs = method.needs
    other = sorted(needs.signals - PREDICTED - EXACT)
    if not needs.gradients:
        what, got = "measures no gradient, so a screen saves nothing", ", ".join(sorted(needs.signals)) or "nothing"
    elif other:
        what, got = "looks at signals that a screen does not predict", ", ".join(other)
    elif not needs.by_row:
        what, got = "does not judge rows one by one, so what a screen loses cannot be bounded", "Needs.by_row is false"
    elif recipe.data.dedup == "keep":
        what, got = "would be given copies, which a sample of rows counts apart", "data.dedup=keep"
    elif recipe.collect.layers is not None:
        what, got = "is to have exact signals after a screen", f"collect.layers={recipe.collect.layers}"
    else:
        return
    raise ConfigError(
        f"{method.name} {what}",
        where="--screen",
        got=got,
        expected="a method such as target_cosine or ogs_dual, every layer, and data.dedup=drop",
        do="leave --screen out, or change the method or setting named here",
    )


def check_alone(recipe: Recipe, seat: Seat | None) -> None:
    """Refuse a screen in a run of several processes.

    Args:
        recipe: the run's settings.
        seat: this process, or None.

    Raises:
        ConfigError: both are asked for.
    """
    if recipe.screen.layers is not None and seat is not None and seat.launcher != "inline":
        raise ConfigError(
            "two stages run in one process",
            where="--screen and --launcher",
            got=seat.launcher,
            expected="inline",
            do="leave --screen out, or run it with --launcher inline",
        )
